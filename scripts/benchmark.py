"""Measures speed and memory beside a plain model, the bare matrix products, and `transfusion-pytorch` if installed.

    pip install transfusion-pytorch==0.20.0                    # optional: the peer
    export OMP_NUM_THREADS=1                                   # CPU seconds then hardly depend on what else runs
    python scripts/benchmark.py --suite train,mixed,decode,denoise --size S,M --out runs/benchmark
    python scripts/benchmark.py --suite train --size M --dtype fp32,bf16 --compile --out runs/compiled
    python scripts/benchmark.py --suite memory,startup --size S,M --out runs/memory
    python scripts/benchmark.py --suite gpu --device cuda --out runs/gpu
    python scripts/benchmark.py --tables runs/benchmark/benchmark.json runs/memory/benchmark.json
    python scripts/benchmark.py --suite train --size S --out runs/now --check runs/benchmark/benchmark.json

All systems of a table run in one process in turn (A B C, C B A), on the same texts and pictures and with the same
fused AdamW; ratios are medians of those within a round. One thread is timed by the CPU time of the process, several by
the clock on the wall, a GPU by its events. Imports and peaks of memory are taken in fresh processes. Nothing is timed
before the model has been found equal to the plain one. Large buffers cost page faults at every step unless glibc keeps
them:

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

With --check the exit code is 1 where a ratio has become more than a tenth worse than in that file.
"""

import argparse
import sys
from pathlib import Path

import torch

from transfusion.benchmarks import gate, gpu, peer
from transfusion.benchmarks.flops import DTYPES, Peak
from transfusion.benchmarks.machine import environment
from transfusion.benchmarks.results import Result, read_record, regressions, write_record
from transfusion.benchmarks.suites import MATCHES, Bench, Options
from transfusion.benchmarks.tables import markdown, print_tables
from transfusion.benchmarks.workloads import SIZES, SUITES, Size


def say(line: str) -> None:
    """Prints at once, for whoever waits."""
    print(line, flush=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="train", help=f"of {','.join(SUITES)}; train without")
    parser.add_argument("--size", default="S", help=f"of {','.join(SIZES)}; S without")
    parser.add_argument(
        "--match", default=",".join(MATCHES), help="what ours has in common with the peer; both without"
    )
    parser.add_argument("--dtype", default="fp32", help=f"of {','.join(DTYPES)}; fp32 without")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compiled layers too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each; 5 without")
    parser.add_argument("--workload", default="", help="only those whose name holds this")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="meet it where installed")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder of benchmark.json and .md")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="JSON", help="only print the Markdown of these")
    parser.add_argument("--check", type=Path, metavar="JSON", help="fail where ratios are worse than there")
    args = parser.parse_args(argv)
    for name, allowed in (("suite", SUITES), ("size", SIZES), ("match", MATCHES), ("dtype", DTYPES)):
        chosen = tuple(getattr(args, name).split(","))
        if unknown := [value for value in chosen if value not in allowed]:
            parser.error(f"--{name} {','.join(unknown)}: choose from {','.join(allowed)}")
        setattr(args, name, chosen)
    if (args.device == "cuda") != ("gpu" in args.suite) or ("gpu" in args.suite and len(args.suite) > 1):
        parser.error("--device cuda has a suite of its own: --suite gpu --device cuda")
    return args


def limit_memory() -> None:
    """Let an allocation beyond the machine's memory fail, and not be killed with all that was measured."""
    try:
        import os
        import resource
    except ImportError:  # not on Windows
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (total, resource.getrlimit(resource.RLIMIT_AS)[1]))


def make_bench(args: argparse.Namespace, sizes: tuple[Size, ...], peak: Peak) -> Bench | gpu.GpuBench:
    """What runs the suites."""
    if args.device == "cuda":
        return gpu.GpuBench(peak, say, args.workload)
    with_peer = args.peer and peer.is_installed()
    if args.peer and not with_peer:
        say("  no peer: pip install transfusion-pytorch==0.20.0")
    options = Options(
        sizes,
        args.match,
        args.dtype,
        args.compile,
        args.threads,
        args.rounds,
        with_peer=with_peer,
        workloads=args.workload,
        say=say,
    )
    return Bench(options)


def main(args: argparse.Namespace) -> int:
    """Measures, prints and writes; returns the exit code."""
    if args.tables:
        for file in args.tables:
            record, stored = read_record(file)
            print(markdown(stored, Peak(**record["peak"])))
        return 0
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        limit_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = tuple(SIZES[name] for name in args.size)
    checks = gate.run_gate(sizes[0] if args.device == "cpu" else SIZES["S"], args.device, say)
    gate.require(checks)
    peak = Peak.measure(args.device)
    for name, rate in peak.matmul.items():
        say(f"  best {name} product: {rate / 1e9:,.0f} GFLOP/s")
    say(f"  best reading: {peak.read / 1e9:,.1f} GB/s")
    record = {
        "environment": environment(args.device),
        "peak": peak.to_dict(),
        "gate": [check.to_dict() for check in checks],
    }
    bench = make_bench(args, sizes, peak)
    results: list[Result] = []
    for suite in args.suite:
        for found in bench.run(suite):
            results += found
            write_record(args.out / "benchmark.json", record, results)
            print_tables(found, peak)
    (args.out / "benchmark.md").write_text(markdown(results, peak))
    if args.check:
        worse = regressions(read_record(args.check)[1], results)
        say("\n".join(worse) or "no ratio is worse")
        return int(bool(worse))
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
