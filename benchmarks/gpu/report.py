"""The results as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Found = dict[str, Any]
RECIPE = "sd3-medium-lora-24gb"
"""Of the stages on a teacher in files."""


def markdown(results: Found) -> str:
    """All tables of the results so far, behind the `notes` on a record that is kept."""
    parts = {name: part.get("found", {}) for name, part in results["parts"].items()}
    lines = [
        f"# On one GPU: {parts.get('machine', {}).get('card', 'not measured')}",
        "",
        f"`{results['command']}`",
        *(line for note in results.get("notes", []) for line in ("", note)),
    ]
    for title, part, write in SECTIONS:
        if parts.get(part):
            body = _guarded(write, parts)
            lines += ["", f"## {title}", "", *body]
    lines += ["", "## Parts", ""]
    lines += table(
        ("part", "status", "seconds"),
        ((name, part["status"], f"{part['seconds']:.0f}") for name, part in results["parts"].items()),
    )
    for name, part in results["parts"].items():
        if part["status"] != "done":
            end = [part.get("error", ""), *part.get("log", [])[-25:]]
            lines += ["", f"### {name}: {part['status']}", "", "```", *filter(None, end), "```"]
    return "\n".join(lines) + "\n"


def _guarded(write: Callable[[Found], list[str]], parts: Found) -> list[str]:
    """A section; of a part that was stopped some figures are not there."""
    try:
        return write(parts)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        return [f"Incomplete: {type(error).__name__} {error}. What is there is in gpu.json."]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", f"| --- {'| ---: ' * (len(head) - 1)}|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def gb(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f} GB"


def rate(value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s"


def machine(parts: Found) -> list[str]:
    found = parts["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    return [
        f"{found['card']}, {gb(found['memory'])}, driver {found['driver']}, CUDA {found['cuda']}; {found['cpus']} CPU"
        f" cores, Python {found['python']}; {versions}.",
        "",
        *(
            f"- a large matrix product in {name}: {rate(found[f'matrix_product_{name}_flops'])}"
            for name in ("bf16", "fp32", "tf32")
        ),
        f"- a copy on the device: {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, bytes read and written together",
    ]


def flop_of(samples: Found, plan: Found) -> float:
    """FLOPs of an iteration, from the samples asked for: every forward as the learner's."""
    return samples.get("plain", 0) * plan["forward_flops"] + samples.get("with_graph", 0) * plan["update_flops"]


def training(which: str) -> Callable[[Found], list[str]]:
    """The tables of a training."""

    def write(parts: Found) -> list[str]:
        found, plan = parts[which], parts.get("plans", {}).get(which)
        rows = []
        for name in ("ours", "plain"):
            measured = found.get(name)
            if measured is None:
                continue
            cells = [name, f"{measured['seconds']:.2f}", f"{measured['seconds'] / found['batch']:.3f}"]
            samples = {key: count / found["batch"] for key, count in measured["samples"].items()}
            cells += [f"{samples.get('plain', 0):.1f}", f"{samples.get('with_graph', 0):.1f}"]
            cells.append(rate(flop_of(measured["samples"], plan) / measured["seconds"]) if plan else "")
            rows.append([*cells, gb(measured["peak"].get("allocated")), gb(measured["peak"].get("reserved"))])
        head = (
            "order",
            "s an iteration",
            "s a sample",
            "forwards",
            "with backward",
            "rate",
            "allocated",
            "reserved",
        )
        lines = [
            f"Batches of {found['batch']} in one forward, {found['rounds']} round(s) of {found['iterations_a_round']}"
            f" iterations each, the same for both; {found['learning']:,} parameters learn"
            + (f", {found['states']} optimiser states." if "states" in found else "."),
            "",
            *table(head, rows),
        ]
        if "plain" in found:
            lines += ["", f"Ours takes {found['plain']['seconds'] / found['ours']['seconds']:.2f} times less."]
        planned = (plan or {}).get("memory")
        allocated = found["ours"]["peak"].get("allocated")
        if planned:
            against = f", {planned['peak'] / allocated:.2f} of what was allocated" if allocated else ""
            lines += ["", f"`cdm plan` counts {gb(planned['peak'])}{against}."]
        if "parts" in found:
            total = sum(found["parts"].values())
            ordered = sorted(found["parts"].items(), key=lambda item: -item[1])
            shares = ((name, f"{seconds:.2f}", f"{seconds / total:.1%}") for name, seconds in ordered)
            lines += ["", *table(("part of a round of ours", "s", "share"), shares)]
        if "checkpoint" in found:
            saved = found["checkpoint"]
            gathered = f"{saved['gather']:.1f} s to gather, " if "gather" in saved else ""  # of older results
            lines += [
                "",
                f"A checkpoint of {gb(saved['bytes'])}: {gathered}{saved['write']:.1f} s to write,"
                f" {saved['read']:.1f} s to read.",
            ]
        return lines

    return write


def sampling(parts: Found) -> list[str]:
    found = parts["sampling"]
    names = ("text encoders", "transformer", "autoencoder", "rest")
    rows = [
        [
            f"{row['model']}, {row['steps']} steps"
            + (f", guided by {row['guidance']}" if row["guidance"] > 1 else ""),
            str(row["pictures"]),
            f"{row['seconds']:.3f}",
            *(f"{row['parts'].get(name, 0):.3f}" for name in names),
            gb(row["peak"].get("allocated")),
        ]
        for row in found["rows"]
    ]
    return [
        "From prompts to pictures in bf16, seconds a picture. "
        + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in found["parameters"].items())
        + ".",
        "",
        *table(("model", "at once", "seconds", *names, "allocated"), rows),
    ]


def stages(which: str, where: str) -> Callable[[Found], list[str]]:
    """The table of the six stages on a teacher of files."""

    def write(parts: Found) -> list[str]:
        found = parts[which]
        pixels = (
            f"{found['resolution']} x {found['resolution']} pixels" if found["resolution"] else "its own size"
        )
        made = found.get("teacher_bytes")
        lines = [
            f"`{RECIPE}` with a teacher of random weights in fp16 files, {where}, pictures of {pixels}, 4 evaluation"
            f" prompts, batches of {found['batch']}. `main memory` is what cannot be dropped (RssAnon); `device`"
            " is what other programs took meanwhile, too."
            + (f" The files, {gb(made)}, were made in {found['teacher_seconds']:.0f} s." if made else ""),
            "",
        ]
        rows = [
            (row["stage"], f"{row['seconds']:.0f}", gb(row["anonymous"]), gb(row.get("device")))
            for row in found["stages"]
        ]
        return lines + table(("stage", "seconds", "main memory", "device"), rows)

    return write


def miniature(parts: Found) -> list[str]:
    found = parts["miniature"]
    lines = [
        f"The recipe of `params.yaml` with {found['iterations']:,} iterations; `stages` and `tests` ran beside it.",
        "",
    ]
    lines += table(("stage", "seconds"), [(name, f"{value:.0f}") for name, value in found["seconds"].items()])
    rows = []
    for model, sets in found.get("quality", {}).items():
        for steps, figures in sets.items():
            if isinstance(figures, dict) and "frechet_distance" in figures:
                keys = ("frechet_distance", "style_distance", "attribute_accuracy")
                number = steps.removeprefix("steps")
                cells = [f"{model}, {number} steps" if number.isdigit() else f"{model}, {number}"]
                rows.append(cells + [f"{figures[key]:.3f}" for key in keys])
    if not rows:
        return [*lines, "", "It did not get as far as its quality."]
    head = ("model", "Fréchet distance", "style distance", "all attributes right")
    return [*lines, "", *table(head, rows)]


def settings(parts: Found) -> list[str]:
    found = parts["settings"]
    rows = []
    for row in found["micro_batches"]:
        cells = [str(row["batch"]), "on" if row["gradient_checkpointing"] else "off"]
        rows.append(cells + _calls(row))
    lines = [
        "A LoRA's forward without a graph, and a forward with its backward: milliseconds a sample.",
        "",
        *table(("samples at once", "gradient checkpointing", "forward", "update", "allocated"), rows),
    ]
    if "tf32" in found:
        tf32 = [[row["precision"], "on" if row["tf32"] else "off", *_calls(row)] for row in found["tf32"]]
        lines += ["", *table(("precision", "TF32", "forward", "update", "allocated"), tf32)]
    return lines


def _calls(row: Found) -> list[str]:
    if row.get("out_of_memory"):
        return ["out of memory", "", ""]
    return [f"{1000 * row['forward']:.1f}", f"{1000 * row['update']:.1f}", gb(row["peak"].get("allocated"))]


def compiled(parts: Found) -> list[str]:
    found = parts["compile"]
    rows = [
        [
            "yes" if row["compiled"] else "no",
            "on" if row["gradient_checkpointing"] else "off",
            *_calls(row),
            f"{row['first']:.1f}",
        ]
        for row in found["calls"]
    ]
    head = ("blocks compiled", "gradient checkpointing", "forward", "update", "allocated", "first call, s")
    return [f"A LoRA, {found['batch']} samples at once: milliseconds a sample.", "", *table(head, rows)]


def compiled_round(parts: Found) -> list[str]:
    found = parts["compiled_round"]
    names = {"round": "not compiled", "first_compiled_round": "compiled, the first", "compiled_round": "again"}
    rows = [(title, f"{found[name]:.1f}") for name, title in names.items() if name in found]
    return table((f"a round of ours, LoRA, batches of {found['batch']}", "seconds"), rows)


def allocator(parts: Found) -> list[str]:
    rows = []
    for title, part in (("as it is", "lora"), ("expandable_segments:True", "allocator")):
        measured = parts.get(part, {}).get("ours")
        if measured:
            peak = measured["peak"]
            cells = [title, f"{measured['seconds']:.2f}", gb(peak.get("allocated")), gb(peak.get("reserved"))]
            rows.append(cells)
    return table(("allocator, LoRA", "s an iteration", "allocated", "reserved"), rows)


def tests(parts: Found) -> list[str]:
    rows = []
    for case in parts["tests"]["cases"]:
        figures = {key: value for key, value in case.items() if key not in ("name", "outcome", "seconds")}
        recorded = ", ".join(f"{key} {value}" for key, value in figures.items())
        rows.append((case["name"], case["outcome"], f"{case['seconds']:.1f}", recorded))
    return table(("tests/gpu", "outcome", "seconds", "figures"), rows)


SECTIONS: tuple[tuple[str, str, Callable[[Found], list[str]]], ...] = (
    ("The machine", "machine", machine),
    ("SD3-Medium at 1024 x 1024, a LoRA of rank 64", "lora", training("lora")),
    ("SD3-Medium at 1024 x 1024, all weights", "full", training("full")),
    ("Sampling SD3-Medium at 1024 x 1024", "sampling", sampling),
    ("All stages on files of SD3-Medium's size", "stages", stages("stages", "on the device")),
    ("The same on the processor", "cpu_stages", stages("cpu_stages", "on the processor alone")),
    ("The miniature, all stages", "miniature", miniature),
    ("Settings", "settings", settings),
    ("Compiled blocks", "compile", compiled),
    ("A compiled round", "compiled_round", compiled_round),
    ("The allocator", "allocator", allocator),
    ("Tests", "tests", tests),
)
