"""The certificate of continuation, on machines that differ on purpose and on resumes that are broken on purpose."""
