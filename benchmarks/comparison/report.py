"""The results of a run, for people: as a table and as pictures."""

from pathlib import Path

OK = {True: "yes", False: "NO", None: "not measured"}


def heading(machine):
    """Describe the machine in a few lines."""
    return "\n".join(
        [
            f"{machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB of memory, Linux {machine.linux}",
            f"  copies          {machine.copy_bytes_per_s / 1e9:>10.1f} GB/s",
            f"  random reads    {machine.read_pages_per_s:>10,.0f} of 4 KiB a second ({machine.reader})",
            f"  writes          {machine.write_bytes_per_s / 1e9:>10.2f} GB/s, sequential",
            f"  fdatasync       {1e6 * machine.sync_s:>10,.0f} us",
        ]
    )


def outcome(result):
    """Format the results of a workload: its arms, then its bars."""
    lines = [f"\n{result.workload}  {result.title}  ({result.seconds:.0f} s)"]
    if result.missing:
        lines.append(f"  missing: {', '.join(result.missing)}")
    if result.skipped:
        lines.append(f"  cannot run here: {result.skipped}")
    if result.error:
        lines.append(f"  FAILED: {result.error}")
    for case in result.cases:
        lines += _case(case)
    return "\n".join(lines)


def _case(case):
    same = {True: ", same bytes", False: ", OTHER BYTES", None: ""}[case.equal]
    lines = [f"  {case.name}{same}", *(f"    ({note})" for note in case.notes)]
    if case.arms:
        lines.append(
            f"    {'':<36}{'ms':>10}{'least - most':>21}{'rows/s':>14}{'ours is':>12}{'of limit':>10}"
        )
        lines += [_arm(arm, case) for arm in case.arms]
    return [*lines, *(_bar(bar) for bar in case.bars)]


def _arm(arm, case):
    ratio = f"{case.arms[0].rate / arm.rate:,.2f} x"
    share = f"{arm.rate / case.limit:.0%}" if case.limit else ""
    note = f"   {arm.note}" if arm.note else ""
    spread = f"{1e3 * min(arm.seconds):.2f} - {1e3 * max(arm.seconds):.2f}" if len(arm.seconds) > 1 else ""
    times = f"{1e3 * arm.median:>10.2f}{spread:>21}"
    return f"    {arm.name:<36}{times}{arm.rate:>14,.0f}{ratio:>12}{share:>10}{note}"


def _bar(bar):
    sign = ">=" if bar.at_least else "<="
    value = "-" if bar.value is None else f"{bar.value:,.2f}"
    further = "" if bar.stretch is None else f"; {sign} {bar.stretch:g}: {OK[bar.stretch_met]}"
    what = f"{bar.what}: {value} {bar.unit}, {sign} {bar.target:,.2f}"
    return f"      {OK[bar.met]:<13}{what}{further}"


def summary(outcomes):
    """Count the bars that were met."""
    bars = [bar for result in outcomes for case in result.cases for bar in case.bars]
    counts = [sum(bar.met is kind for bar in bars) for kind in (True, False, None)]
    failed = [result.workload for result in outcomes if result.error]
    text = f"\n{counts[0]} bars met, {counts[1]} not met, {counts[2]} not measured"
    return text + (f"; failed: {', '.join(failed)}" if failed else "")


# ---- pictures -----------------------------------------------------------------------------------------------------


def plot(outcomes, folder):
    """Draw rows per second by arm, in one picture per case, with the device's limit as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for result in outcomes:
        for number, case in enumerate(case for case in result.cases if case.arms):
            made.append(folder / f"{result.workload}-{number}.png")
            _draw(result, case, made[-1])
    return made


def _draw(result, case, file):
    from matplotlib import pyplot

    arms = sorted(case.arms, key=lambda arm: arm.rate)
    ours = case.arms[0].name
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.32 * len(arms)), layout="constrained")
    colors = ["#1f6fb2" if _is_ours(arm, ours) else "#b8bec6" for arm in arms]
    bars = axes.barh([arm.name for arm in arms], [arm.rate for arm in arms], color=colors)
    axes.bar_label(bars, [f" {arm.rate:,.0f}" for arm in arms], fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("rows/s")
    axes.set_title(f"{result.workload}  {result.title}: {case.name}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if case.limit:
        axes.axvline(case.limit, color="#c2410c", linestyle="--", linewidth=1)
        axes.text(case.limit, 1.0, "device ", ha="right", va="bottom", fontsize=8, color="#c2410c",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _is_ours(arm, ours):
    return arm.name == ours or arm.name.startswith(("lookup", "write + commit", "commit"))
