"""A program that ends, prints or waits in the way that its argument names."""

import json
import os
import sys
import time

case = sys.argv[1]
if case == "early":
    sys.exit(0)
if case == "forever75":
    sys.exit(75)
if case == "usage":
    sys.exit(2)
if case == "input":
    input("a question? ")
if case == "data":
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": "a shard is missing", "extraInfo": {}}}, file)
    sys.exit(65)
if case == "hangs":
    time.sleep(600)
if case == "binary":
    sys.stdout.buffer.write(bytes(range(256)) * 4000)
    print("\nstep 10", flush=True)
if case == "words":
    assert sys.argv[2:] == ["a b", "line\nbreak", "$HOME"], sys.argv
    assert "PYTHONPATH" not in os.environ and os.environ["RUN_RESUMES"] == "0"
    assert os.environ["WORLD_SIZE"] == "1" and os.environ["MASTER_PORT"].isdigit()
    print("step 10", flush=True)
