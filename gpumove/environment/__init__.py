"""What a job runs on, and what comes of running it elsewhere: fingerprints, and their graded differences. No torch."""
