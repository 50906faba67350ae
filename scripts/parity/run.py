"""Compares crates/models with transformers, diffusers and PEFT, afresh: `make parity`.

1. Fixtures are generated anew with the installed libraries and the Rust tests run on them.
2. A pipeline folder that the Rust tests write, one that they read from diffusers and write again, and
   adapters are loaded by the libraries (load.py), by the older ones too (`--older`).
3. So is the folder that a run trained (`--trained`, runs/demo/model), where there is one.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=pathlib.Path, default=ROOT / "runs" / "demo" / "model",
                        help="model folder that a run exported (default: the demo's)")
    parser.add_argument("--older", type=pathlib.Path, metavar="PYTHON",
                        help="an interpreter that sees older libraries, which must load the folders too")
    return parser.parse_args()


def main():
    given = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        fixtures = scratch / "fixtures"
        subprocess.run([sys.executable, HERE / "generate.py", fixtures], check=True)
        paths = {"DUET_FIXTURES": fixtures, "DUET_PARITY_FOLDER": scratch / "folder",
                 "DUET_PARITY_AGAIN": scratch / "again", "DUET_PARITY_ADAPTERS": scratch / "adapters"}
        env = os.environ | {key: str(path) for key, path in paths.items()}
        tests = ["--test", "parity", "--test", "folder", "--test", "losses"]
        subprocess.run(["cargo", "test", "--workspace", *tests], cwd=ROOT, env=env, check=True)
        folders = [scratch / "folder", scratch / "again"]
        if (given.trained / "model_index.json").is_file():
            folders.append(given.trained)
        else:
            print(f"no trained folder at {given.trained}: run `make demo` first to check it too")
        load = [HERE / "load.py", *folders]
        subprocess.run([sys.executable, *load, "--adapters", scratch / "adapters"], check=True)
        if given.older:
            subprocess.run([given.older, *load], check=True)
    print("parity: ok")


if __name__ == "__main__":
    main()
