"""Cuts every pause of a process short and notes it in the file M3QUANT_TEST_PAUSES. On the path of a Python that starts, it runs by itself."""

import os
import time

pause, noted = time.sleep, os.environ["M3QUANT_TEST_PAUSES"]


def sleep(seconds: float) -> None:
    with open(noted, "a") as file:
        file.write(f"{seconds}\n")
    pause(min(seconds, 0.01))


time.sleep = sleep
