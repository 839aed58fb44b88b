"""Handlers of ``bench`` and ``doctor``."""

from __future__ import annotations

from argparse import Namespace

from pipelines.cli_outcome import Outcome


def bench(args: Namespace) -> Outcome:
    """Run one bench, or list them."""
    from pipelines.bench import BENCHES, built_benches, run_bench

    if args.name == "list":
        built = built_benches()
        lines = [f"{name:16} {'' if name in built else '(not built yet) '}{what}" for name, what in BENCHES.items()]
        document = [{"bench": name, "built": name in built, "measures": what} for name, what in BENCHES.items()]
        return Outcome(text="\n".join(lines), document=document)
    checkpoint = args.checkpoint.resolve() if args.checkpoint else None
    report = run_bench(args.name, quick=args.quick, seed=args.seed, checkpoint=checkpoint)
    return Outcome(text=report.table(), document=report.to_json())


def doctor(args: Namespace) -> Outcome:
    """Check the machine; exit code 1 if anything needed is missing."""
    from pipelines.doctor import examine

    checks = examine(deep=args.deep)
    lines = [
        f"{check.verdict:8} {check.name}: {check.found}" + (f"; {check.mend}" if check.mend else "") for check in checks
    ]
    well = all(check.verdict != "missing" for check in checks)
    document = {"ok": well, "checks": [check.to_json() for check in checks]}
    return Outcome(text="\n".join(lines), document=document, ok=well)
