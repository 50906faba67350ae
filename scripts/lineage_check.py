"""Reads a run's tables with DuckDB and with pandas, as docs/lineage.md shows: `make lineage-check`.

usage: lineage_check.py RUN
"""

import pathlib
import re
import sys

import duckdb
import pandas

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLES = ["prompts", "traces", "leaves", "rewards", "advantages", "updates"]


def main():
    run = pathlib.Path(sys.argv[1])
    database = duckdb.connect()
    for table in TABLES:
        frame = pandas.read_parquet(run / "lineage" / table)
        files = f"{run}/lineage/{table}/*/*.parquet"
        rows = database.sql(f"select * from read_parquet('{files}', hive_partitioning = true)").df()
        assert len(frame) == len(rows) > 0, f"{table}: pandas {len(frame)}, DuckDB {len(rows)} rows"
        assert set(frame.columns) == set(rows.columns), f"{table}: {set(frame.columns) ^ set(rows.columns)}"
        numbers = frame.select_dtypes("number").columns.difference(["iteration"])
        for column in numbers:
            one, two = sorted(frame[column].dropna()), sorted(rows[column].dropna())
            assert one == two, f"{table}.{column} differs between pandas and DuckDB"
        print(f"{table}: {len(frame)} rows, {len(frame.columns)} columns")
    text = (ROOT / "docs" / "lineage.md").read_text()
    query = re.search(r"```sql\n(.*?)```", text, re.S).group(1).strip().rstrip(";")
    query = query.replace("runs/demo", str(run))
    found = database.sql(query).fetchall()
    frame = pandas.read_parquet(run / "lineage" / "advantages")
    frame = frame[frame.branch == "llm"]
    frame["iteration"] = frame["iteration"].astype(int)
    wanted = frame.groupby("iteration").reward.mean().sort_index()
    assert [row[0] for row in found] == list(wanted.index), (found, wanted)
    for (iteration, mean), expected in zip(found, wanted):
        assert abs(mean - expected) < 1e-12, f"iteration {iteration}: {mean}, pandas {expected}"
    print(f"the query of docs/lineage.md: {len(found)} iterations, as pandas has them")


if __name__ == "__main__":
    main()
