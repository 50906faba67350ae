"""target/bench/results.json: what the benches found, one row a figure.

A row has a name, ours, the peer's, their ratio, a unit and what is wanted of the ratio (of ours where there is no
peer). A bench replaces the rows of its own names and leaves the others.
"""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "target" / "bench" / "results.json"


def row(name, ours, peer, ratio, unit, wanted):
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "wanted": wanted}


def record(rows):
    """Writes the rows, in place of those of the same names."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    names = {each["name"] for each in rows}
    kept = [each for each in before if each["name"] not in names]
    RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n")
    print(f"written to {RESULTS.relative_to(ROOT)}")
