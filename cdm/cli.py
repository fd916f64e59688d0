"""The command `cdm` and its subcommands. Modules that are slow to import are imported in the command that needs
them."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cdm import limits
from cdm.errors import CdmError
from cdm.system import boundary
from cdm.system.environment import prepare_environment

app = typer.Typer(
    help="Few-step students of text-to-image models: draw with them, pass them on, choose, check and plan a training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
params_app = typer.Typer(help="Parameters of the pipeline.", no_args_is_help=True)
app.add_typer(params_app, name="params")
recipe_app = typer.Typer(help="Complete params files, ready to use.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
scorer_app = typer.Typer(help="Programs that score pictures.", no_args_is_help=True)
app.add_typer(scorer_app, name="scorer")


def show_version(wanted: bool) -> None:
    """Print the version and end, where it is `wanted`."""
    if wanted:
        from cdm.system.version import describe

        print(f"cdm {describe()}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version, and the commit of a clone.",
            callback=show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Options of `cdm` itself."""


class DType(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class SampleDType(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; each prompt makes one picture.")],
    out: Annotated[Path, typer.Option(help="PNG to write; with several prompts NAME-1.png, NAME-2.png, ...")],
    steps: Annotated[
        int, typer.Option(help="Evaluations of the student: more take longer and look better.")
    ] = 4,
    student: Annotated[
        Path, typer.Option(help="The student: models/student, or what `cdm export` has written.")
    ] = Path("models/student"),
    seed: Annotated[
        int,
        typer.Option(help="The same seed draws the same picture; of several prompts the next has the next."),
    ] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="One PNG with all pictures side by side.")] = False,
    zoom: Annotated[
        int, typer.Option(help="Each pixel becomes a square of so many, without blur: for small pictures.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[
        SampleDType, typer.Option(help="Precision; auto is fp32 on a CPU and bf16 elsewhere.")
    ] = SampleDType.auto,
) -> None:
    """Draw pictures of PROMPTS with a student."""
    check_sample(prompts, out, steps, seed, zoom)
    from cdm.data.sampling import tile, write_png
    from cdm.handover.drawing import draw_pictures, enlarge

    images = draw_pictures(student, prompts, steps, seed, device=device, dtype=dtype.value)
    metadata: dict[str, str | int] = {"steps": steps, "model": str(student)}
    if grid or len(prompts) == 1:
        write_png(out, enlarge(tile(images), zoom), prompt="\n".join(prompts), seed=seed, **metadata)
        print(out)
        return
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = out.with_name(f"{out.stem}-{number + 1}{out.suffix}")
        write_png(path, enlarge(image, zoom), prompt=prompt, seed=seed + number, **metadata)
        print(path)


def check_sample(prompts: list[str], out: Path, steps: int, seed: int, zoom: int = 1) -> None:
    """Makes the folder of `out`; raises CdmError for arguments of `cdm sample` that cannot be used."""
    for prompt in prompts:
        check_prompt(prompt)
    if not 1 <= steps <= limits.STEPS:
        raise CdmError(f"--steps is {steps}: give a number from 1 to {limits.STEPS}")
    if not 0 <= seed <= limits.SEED - len(prompts):
        raise CdmError(f"--seed is {seed}: give 0 or more, up to about {limits.SEED:.0e}")
    if not 1 <= zoom <= limits.ZOOM:
        raise CdmError(f"--zoom is {zoom}: give a number from 1 to {limits.ZOOM}")
    if out.suffix.lower() != ".png":
        raise CdmError(f"--out is {out}: give a name that ends in .png")
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)


def check_prompt(prompt: str) -> None:
    """Raises CdmError for a PROMPT that is none."""
    if not prompt.strip():
        raise CdmError("PROMPT is empty: say what to draw")
    if len(prompt) > limits.PROMPT:
        raise CdmError(f"PROMPT has {len(prompt):,} characters: at most {limits.PROMPT:,}")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise CdmError("PROMPT is not UTF-8 text: give it as UTF-8")


def check_out(out: Path) -> None:
    """Raises CdmError if `out` cannot be written, or lies in what the pipeline writes or in a model."""
    from cdm.families.configs import INDEX
    from cdm.system.places import check_file, check_is_nobodys

    try:
        check_file(out)
        check_is_nobodys(out, marks=[INDEX])
    except CdmError as error:
        raise CdmError(f"--out: {error}") from None


@app.command()
def demo(
    student: Annotated[
        Path, typer.Argument(help="The student: models/student, or what `cdm export` has written.")
    ] = Path("models/student"),
    port: Annotated[int, typer.Option(help="Of the page, on 127.0.0.1.", min=1, max=65535)] = 7860,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[
        SampleDType, typer.Option(help="Precision; auto is fp32 on a CPU and bf16 elsewhere.")
    ] = SampleDType.auto,
    teacher_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the teacher; otherwise latents.steps, or 50.", min=1, max=limits.STEPS),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of the teacher; otherwise teacher.guidance_scale.")
    ] = None,
) -> None:
    """Play with STUDENT on a page in the browser, beside its teacher if that is on this machine."""
    from cdm.handover.demo_page import check, serve

    check(port)
    from cdm.handover.demo import open_demo

    serve(
        open_demo(
            student, device=device, dtype=dtype.value, teacher_steps=teacher_steps, guidance_scale=guidance
        ),
        port,
    )


class Format(StrEnum):
    diffusers = "diffusers"
    lora = "lora"
    single_file = "single-file"
    comfyui = "comfyui"


PushTo = Annotated[
    str | None, typer.Option("--push", metavar="ORG/NAME", help="Push it to a hub, too, with its card.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the hub a private one.")]


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="The student, such as models/student.")],
    out: Annotated[
        Path, typer.Option(help="What to write: a folder, or NAME.safetensors for single-file and comfyui.")
    ],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="diffusers: a complete folder; lora: the adapter alone; single-file: the transformer;"
            " comfyui: the adapter with ComfyUI's names of layers.",
        ),
    ] = Format.diffusers,
    dtype: Annotated[DType, typer.Option(help="Precision of the student's own weights.")] = DType.fp32,
    metrics: Annotated[
        Path, typer.Option(help="Figures for the model card, if they are of this student.")
    ] = Path("metrics/quality.json"),
    push_to: PushTo = None,
    private: Private = False,
) -> None:
    """Write STUDENT as plain diffusers loads it, with a model card."""
    from cdm.handover.export import export as write
    from cdm.handover.push import check_push, push

    if push_to is not None:
        check_push(push_to)
    done = write(student, out, form.value, precision=dtype.value, metrics=metrics)
    if done.remark is not None:
        print(done.remark, file=sys.stderr)
    print(f"{done.path}\n{done.card}: what it is, and how to draw with it")
    if push_to is not None:
        print(push(done.path, push_to, private=private))


@app.command("push")
def push_(
    path: Annotated[Path, typer.Argument(help="What `cdm export` has written.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the hub; it is made if it is not there.")],
    private: Private = False,
) -> None:
    """Push the export PATH to a hub: its files and its card, in one commit."""
    from cdm.handover.push import push

    print(push(path, repository, private=private))


@app.command()
def compare(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Experiments of DVC, revisions of Git, or workspace; the others are compared with the first, a single"
            " one with HEAD. None: HEAD, its experiments and the workspace."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("compare.html"),
    brief: Annotated[bool, typer.Option("--brief", help="A row an experiment, and no page.")] = False,
) -> None:
    """Compare EXPERIMENTS: what was changed, figures with intervals, curves, the same prompts side by side."""
    if not brief and out.suffix.lower() not in (".html", ".htm"):
        raise CdmError(f"--out is {out}: give a name that ends in .html")
    if not brief:
        check_out(out)
    from cdm.experiments.comparison import compare as read
    from cdm.experiments.tables import brief_table, full_table

    compared = read(experiments or ())
    print(brief_table(compared) if brief else full_table(compared))
    if not brief:
        from cdm.experiments.page import write_page

        problems = write_page(compared, out)
        print("\n".join(["", *problems, f"{out}: curves, tables and pictures"]))


@app.command()
def judge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="What `cdm sample` takes, or a diffusers folder or hub id of a known family; behind it, if wanted,"
            " ,steps=50 ,guidance=4.5 ,sigmas=1/0.75/0.5/0.25 ,name=base ,precision=bf16 ,revision=main ,tokens=256"
            " ,resolution=1024.",
        ),
    ],
    prompts: Annotated[list[Path], typer.Option(help="File or folder of prompts; may be given several times.")],
    measure: Annotated[
        list[str] | None, typer.Option(help="A measure, as in `evaluate.metrics`; may be given several times.")
    ] = None,
    judge_folder: Annotated[
        Path | None, typer.Option("--judge", help="Folder of a judge of what the prompts name.")
    ] = None,
    real: Annotated[Path | None, typer.Option(help="File of real pictures of the prompts.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="The model that others are compared with; otherwise the first.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt.", min=1)] = 1,
    count: Annotated[int | None, typer.Option(help="The first so many prompts; otherwise all.", min=1)] = None,
    column: Annotated[str, typer.Option(help="Column or key of the prompts.")] = "prompt",
    params: Annotated[
        Path | None,
        typer.Option(help="A params file whose `evaluate.models` say where models of measures are."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, the same for all models.", min=0)] = 0,
    precision: Annotated[
        SampleDType, typer.Option(help="Arithmetic; auto is fp32 on a CPU and bf16 elsewhere.")
    ] = SampleDType.auto,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder of pictures, figures, table and page; what is there is not made again.")
    ] = Path("judged"),
) -> None:
    """Judge MODELS on the same prompts and seeds: a table with intervals and paired differences, and a page."""
    check_out(out / "table.md")
    from cdm.handover.drawing import default_precision
    from cdm.judging.arguments import judging_of
    from cdm.params import load
    from cdm.system.device import choose_device

    chosen = default_precision(choose_device(device)) if precision == "auto" else precision.value

    settings: dict[str, object] = {
        "metrics": measure or [],
        "judge": None if judge_folder is None else str(judge_folder),
        "real": None if real is None else str(real),
        "per_prompt": per_prompt,
        "count": count,
        "column": column,
        "seed": seed,
        "precision": chosen,
        "runtime": {"device": device, "batch_size": batch},
    }
    if params is not None:
        settings["metric_models"] = load(params).evaluate.models.model_dump(mode="json")
    judging = judging_of(models, prompts, reference, **settings)
    from cdm.judging.run import judge as run
    from cdm.judging.tables import text_table

    print(text_table(run(judging, out)))
    print(f"{out / 'table.md'}, {out / 'table.csv'}, {out / 'page/index.html'}: the same, and pictures")


@app.command()
def fetch(
    file: Annotated[
        Path | None, typer.Argument(help="A params file, or one of a judging; otherwise params.yaml.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="A measure, as in `evaluate.metrics`; may be given several times.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHERE", help="Where a model is, as in `evaluate.models`; may be given several times."
        ),
    ] = None,
) -> None:
    """Get the models that the measures of FILE need, and check their hashes."""
    from cdm.judging.design import sections_of
    from cdm.models.fetch import fetch as get

    for section in sections_of(file, metric or [], model or []):
        for line in get(section):
            print(line)


@app.command()
def baseline(
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether there is something to commit.")
    ] = False,
) -> None:
    """Commit the results of this machine, so that experiments are compared with them."""
    from cdm.experiments.baseline import commit_baseline, notice

    if check:
        for line in notice():
            print(line)
        return
    commit = commit_baseline()
    print(f"{commit}: your baseline" if commit else "the results are those of the commit: nothing to do")


@app.command("offline-plots")
def offline_plots() -> None:
    """Make the pages of `dvc plots` readable without a network, in this repository."""
    from cdm.experiments.offline import set_up

    print(f"{set_up()}: `dvc plots show` and `dvc plots diff` use it from now on")


class Sharding(StrEnum):
    none = "none"
    fsdp = "fsdp"


@app.command()
def plan(
    file: Annotated[Path, typer.Argument(help="A params file, such as params.yaml.")],
    processes: Annotated[int, typer.Option(help="Processes, one a GPU, that share the batch.")] = 1,
    sharding: Annotated[
        Sharding, typer.Option(help="none: each holds all networks; fsdp: FSDP2 shards them.")
    ] = Sharding.none,
    flops: Annotated[
        float | None,
        typer.Option(
            help="Peak FLOP/s of a GPU, for the time; without it 4e14, or on a CPU what is measured on it."
        ),
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that is used.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print bytes, FLOPs and seconds as JSON.")] = False,
) -> None:
    """Plan the training of FILE: memory, FLOPs, disk and time. Needs no weights and no GPU."""
    from cdm.params import load
    from cdm.planning.architecture import find
    from cdm.planning.plan import PEAK_FLOPS, make_plan, stored_prompts
    from cdm.planning.speed import measure
    from cdm.planning.tables import table

    params = load(file)
    architecture = find(params.teacher, params.prompts.max_sequence_length)
    peak = PEAK_FLOPS if flops is None else flops
    made = make_plan(
        params,
        architecture,
        processes=processes,
        sharding=sharding.value,
        peak_flops=peak,
        utilisation=utilisation,
        prompts=stored_prompts(params.prompts, params.seed),
        speed=measure(params, architecture, processes) if flops is None else None,
    )
    if as_json:
        print(json.dumps(made.as_dict(), indent=1))
    else:
        print("\n".join(table(made, params.distill, peak, utilisation)))


@params_app.command()
def check(file: Annotated[Path, typer.Argument(help="A params file, such as params.yaml.")]) -> None:
    """Check a params file: every key and value, the files that it names, and what it asks of the teacher."""
    from cdm.models.metric_models import without_missing
    from cdm.params import load
    from cdm.preflight import check_lists, check_models, check_run, check_teacher

    params = load(file)
    check_run(params, str(file))
    check_lists(params)
    check_teacher(params)
    check_models(params.evaluate)
    for name, problem in without_missing(params.evaluate)[1].items():
        print(f"without {name}: {problem}: `cdm fetch {file}` gets models")
    print(f"{file}: in order")


ParamsFile = Annotated[Path, typer.Option("--params", help="The params file, for its `evaluate.scorers`.")]
ScorerFolder = Annotated[Path, typer.Option("--scorers", help="The folder of scripts.")]


@scorer_app.command("list")
def list_scorers(file: ParamsFile = Path("params.yaml"), folder: ScorerFolder = Path("scorers")) -> None:
    """Name the scorers of the params file and the scripts of the folder, with a line on each."""
    from cdm.evaluation.scorer_check import find_scripts
    from cdm.params import load

    known = load(file).evaluate.scorers if file.exists() else []
    rows = [(scorer.name, f"{file}: {scorer.command}") for scorer in known]
    rows += [(script.name, f"{script.path}: {script.summary}") for script in find_scripts(folder)]
    if not rows:
        raise CdmError(
            f"{folder}: no scorers there, and none in {file}: run this in the root of the repository"
        )
    width = max(len(name) for name, _ in rows)
    for name, said in rows:
        print(f"{name:<{width}}  {said}")


@scorer_app.command("check")
def check_scorer(
    name: Annotated[str, typer.Argument(help="As `cdm scorer list` has it, or the path of a script.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of a script, behind --.", metavar="-- OPTION...")
    ] = None,
    file: ParamsFile = Path("params.yaml"),
    folder: ScorerFolder = Path("scorers"),
    python: Annotated[
        str, typer.Option(help="What runs a script: the Python of its environment.")
    ] = sys.executable,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A list whose first two prompts are asked for: some scorers know only their own."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column or key of the prompts.")] = "prompt",
    minutes: Annotated[
        float | None,
        typer.Option(help="It is stopped after so many; otherwise runtime.scorer_minutes.", min=0.01),
    ] = None,
) -> None:
    """Run the scorer NAME on two pictures and print its scores, or what is wrong with it."""
    from cdm.data.prompt_lists import read_prompts
    from cdm.evaluation import scorer_check
    from cdm.params import Runtime, load

    params = load(file) if file.exists() else None
    known = params.evaluate.scorers if params else []
    runtime = params.runtime if params else Runtime()
    scorer = scorer_check.find_scorer(name, known, folder, python)
    if options:
        scorer = scorer.model_copy(update={"command": shlex.join([*shlex.split(scorer.command), *options])})
    texts = list(scorer_check.PROMPTS)
    if prompts is not None:
        texts = read_prompts([prompts], column)[0][:2]
    checked = scorer_check.check_scorer(
        scorer,
        texts,
        minutes=minutes or runtime.scorer_minutes,
        limit="--minutes" if minutes else "runtime.scorer_minutes",
        scripts=scorer_check.find_scripts(folder),
    )
    print(f"{scorer.name}: {checked}")


RecipeFolder = Annotated[Path, typer.Option("--recipes", help="The folder of recipes.")]


@recipe_app.command("list")
def list_(recipes: RecipeFolder = Path("recipes")) -> None:
    """Name the recipes, with a line on each."""
    from cdm.handover.recipes import list_recipes

    found = list_recipes(recipes)
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        print(f"{recipe.name:<{width}}  {recipe.summary}")


@recipe_app.command("use")
def use(
    name: Annotated[str, typer.Argument(help="As `cdm recipe list` has it.")],
    to: Annotated[Path, typer.Option(help="The params file to write.")] = Path("params.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes that are not in Git.")] = False,
    recipes: RecipeFolder = Path("recipes"),
) -> None:
    """Make the recipe NAME the params file."""
    from cdm.handover.recipes import use_recipe

    recipe = use_recipe(recipes, name, to, force=force)
    print(f"{to}: {recipe.summary}")
    print("Next:")
    print(f"  cdm fetch {to}           # the models of its measures")
    print(f"  cdm params check {to}    # are all the files there that it names?")
    print(f"  cdm plan {to}            # memory, disk and time of the training")
    if to == Path("params.yaml"):
        print("  dvc repro                       # all stages")
    else:
        print(f"  cp {to} params.yaml && dvc repro")


def main() -> None:
    """Run the command; a problem that the user can mend is a line, not a traceback."""
    prepare_environment()
    boundary.run(app)


if __name__ == "__main__":
    main()
