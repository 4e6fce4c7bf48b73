"""Records are read by many threads at once, also the very first time: a restore begins with nothing else."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import os, random, sys, threading, time
import gpumove.errors, gpumove.format.codec

def first_use():
    sys.setswitchinterval(1e-6)
    import gpumove.format.manifest as records
    data = (b'{"format":1,"run":"r","attempt":"a","rank":0,"world_size":1,"step":1,"local":[],"values":{},'
            b'"packs":[{"attempt":"a","digest":"d","nbytes":1}],'
            b'"tensors":[{"fqn":"f","dtype":"d","shape":[1],"chunks":[{"offset":[0],"shape":[1],"inline":"AA=="}]}]}')
    together = threading.Barrier(6)

    def read():
        moment = random.random() * 0.0015
        together.wait()
        began = time.perf_counter()
        while time.perf_counter() - began < moment:
            pass
        records.decode(records.Part, data, key="key")

    threads = [threading.Thread(target=read) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]

died = 0
for _ in range(80):
    child = os.fork()
    if child == 0:
        first_use()
        os._exit(0)
    died += os.waitpid(child, 0)[1] != 0
print(died)
"""


def test_the_first_reads_of_a_process_may_be_concurrent() -> None:
    # msgspec resolves a class when it is first decoded; two threads in there at once crashed one process in ten.
    found = subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120, capture_output=True, text=True)
    assert found.stdout.strip() == "0", found.stderr
