"""Several methods and seeds side by side: the tables of the README.

    python compare.py --methods comigs,local,fedavg,centralized --seeds 3 [flags of train.py]

A run that is already in the folder, with the same settings, isn't run again; so this can be stopped and started again.
"""

import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from data import BadInput
from settings import Parser, Settings, parse_settings, status_of
from train import Run


def result_of(settings: Settings) -> dict:
    """The result of a run: from its folder if it ended there, else by running it, anew if it was broken off."""
    config, result = (Path(settings.out) / name for name in ("config.json", "result.json"))
    wanted = json.loads(json.dumps(asdict(settings)))
    if config.exists() and json.loads(config.read_text())["settings"] | {"overwrite": settings.overwrite} == wanted:
        if result.exists():
            return json.loads(result.read_text())
        settings = replace(settings, overwrite=True)
    return Run(settings).play()


def mean_and_deviation(values: list[float]) -> str:
    """mean_and_deviation([1.0, 2.0, 3.0]) -> "2.00 ± 1.00"."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: test perplexity of each method, mean ± standard deviation over seeds, by user and over users."""
    users = [user["name"] for user in next(iter(results.values()))[0]["users"]]
    rows = [["method", *users, "mean", "bits/byte", "MB sent"]]
    for method, runs in results.items():
        by_user = [[result["users"][i]["test_ppl"] for result in runs] for i in range(len(users))]
        rows.append([method, *map(mean_and_deviation, by_user),
                     mean_and_deviation([result["mean_test_ppl"] for result in runs]),
                     f"{statistics.mean(result['mean_test_bpb'] for result in runs):.3f}",
                     f"{runs[0]['bytes_up'] / 1e6:.0f}"])
    trigrams = [user["trigram_ppl"] for user in next(iter(results.values()))[0]["users"]]
    rows.append(["trigram", *(f"{ppl:.2f}" for ppl in trigrams), f"{statistics.mean(trigrams):.2f}", "", ""])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compare() -> None:
    """Raises BadInput."""
    parser = Parser(description=__doc__.splitlines()[0], epilog="All other flags are train.py's.", allow_abbrev=False)
    parser.add_argument("--methods", default="comigs,local,fedavg,centralized", help="default: all four")
    parser.add_argument("--seeds", default="3", help="how many: 0, 1, ... (default: 3)")
    parser.add_argument("--out", default="out/compare", help="folder of the runs (default: out/compare)")
    ours, theirs = parser.parse_known_args()
    if not ours.seeds.isdigit() or int(ours.seeds) < 1:
        raise BadInput(f"--seeds {ours.seeds}: not possible; give a whole number of at least 1")
    settings = {method: [parse_settings([*theirs, "--method", method, "--seed", str(seed),
                                         "--out", f"{ours.out}/{method}-seed{seed}"])
                         for seed in range(int(ours.seeds))] for method in ours.methods.split(",")}
    results = {method: [result_of(one) for one in each] for method, each in settings.items()}
    (Path(ours.out) / "table.md").write_text(table(results) + "\n")
    print(table(results))


def main() -> int:
    return status_of("compare.py", compare, "the runs that ended are kept")


if __name__ == "__main__":
    sys.exit(main())
