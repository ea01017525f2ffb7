"""Line coverage per target from llvm-cov's JSON: coverage.py REPORT MINIMUM TARGET..."""

import json
import sys

report, minimum, targets = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
files = json.load(open(report, encoding="utf-8"))["data"][0]["files"]
low = False
for target in targets:
    lines = covered = 0
    worst = []
    for file in files:
        if f"/Sources/{target}/" in file["filename"]:
            summary = file["summary"]["lines"]
            lines += summary["count"]
            covered += summary["covered"]
            worst.append((summary["percent"], file["filename"].rsplit("/", 1)[-1]))
    percent = 100 * covered / max(lines, 1)
    worst = ", ".join(f"{name} {value:.0f} %" for value, name in sorted(worst)[:3])
    print(f"{target}: {percent:.1f} % of {lines} lines (least: {worst})")
    low |= lines == 0 or percent < minimum
sys.exit(1 if low else 0)
