"""What a kept prompt spares: benches/kept.py target/release [ROUNDS]    (5 if not said)

The time of a prompt by a server that has just started, as `timings.prompt_ms` says it, over the time by one that finds it in
its folder; SmolLM2 over a worker that was started anew too, f32 rows, in turns. Answers are held against each other first: what a
folder gives against what a slot's own cache gives, where the last token goes alone too. Host on core 0, worker on core 1, where
there is `taskset`. Prompts of several lengths: what is read and what the worker computes again grows with them, as what is spared
does.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from served import Processes, Split, asked, on, real_model, wait_until_ready

CTX, LENGTHS = 2048, (100, 500, 1500)


def timed(programs, split, prompt, more, times=1):
    """Tokens and timings, of each time; of a server and a worker of their own, which end in order."""
    with Processes() as processes:
        worker = processes.start(on(1, *split.worker(2)))
        address = processes.start(on(0, *split.serve(worker, 1), *more)).removeprefix("http://")
        wait_until_ready(address)
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        said = [json.load(asked(address, "POST", "/v1/completions", body)) for _ in range(times)]
        # SIGTERM: what the slot holds is kept
        processes.all[-1].terminate()
        processes.all[-1].wait()
    return [(one["choices"][0]["tokens"], one["timings"]) for one in said]


def main():
    programs, rounds = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    model = real_model() or sys.exit("error: no real weights (sh .ci/model fetches them)")
    with tempfile.TemporaryDirectory() as folder:
        split = Split(programs, Path(folder), model, "10..19", ctx=CTX)
        for length in LENGTHS:
            prompt = [1 + (i * i * 31 + 7 * i) % 40_000 for i in range(length)]
            kept = ["--cache-dir", Path(folder) / f"kept-{length}"]
            (expected, _), (expected_held, _) = timed(programs, split, prompt, kept, times=2)
            mib = sum(file.stat().st_size for file in kept[1].iterdir()) / (1 << 20)
            ratios, times = [], []
            for _ in range(rounds):
                ((without, fresh),) = timed(programs, split, prompt, [])
                ((tokens, found),) = timed(programs, split, prompt, kept)
                assert without == expected, "not the same tokens from one run to the next"
                assert tokens == expected_held and found["cache_n"] == length - 1, "not what was kept"
                ratios.append(fresh["prompt_ms"] / found["prompt_ms"])
                times.append((fresh["prompt_ms"], found["prompt_ms"]))
            fresh, found = (statistics.median(column) for column in zip(*times))
            print(
                f"{length} tokens, {mib:.1f} MiB: {fresh:.0f} ms without, {found:.0f} ms with, "
                f"median {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


main()
