"""One run, from config to evidence: training, baseline, scores."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cmapkd.config import ConfigError, closest, printable, writing
from cmapkd.results import RunResult, Scores
from cmapkd.run.build import open_training
from cmapkd.run.config import RunConfig
from cmapkd.run.folder import prepare_folder, write_json, write_yaml
from cmapkd.run.measure import account, measure, open_final
from cmapkd.run.train import train
from cmapkd.training.processes import start_processes, wait_for_all, was_restarted


def run(
    config: RunConfig,
    *,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
    teacher_scores: Scores | None = None,
) -> RunResult:
    """Trains the student, measures it beside its teacher and baseline, and leaves everything in `out`.

    Args:
        out: run folder, new or empty; with `resume`, one that an interrupted run of the same config left. Processes
            that torchrun started again resume by themselves.
        console: where progress is shown; none for silence.
        teacher_scores: this teacher's on the same final data, if they are known from another run; measured if none.
    Returns:
        What `metrics.json` holds. In processes other than the first, an empty result.
    Raises:
        ConfigError: a name in the config is unknown, or `out` holds another run.
        Interrupted, NonFiniteLossError, ValueError: see `Trainer.run`.
    """
    if isinstance(config.baseline, Path) and not config.baseline.is_dir():
        known = ("none", "scratch")
        raise ConfigError(
            f"baseline {str(config.baseline)!r}{closest(str(config.baseline), known)} is neither "
            f"{' nor '.join(known)}, and there is no such run folder"
        )
    if config.baseline == "scratch" and not config.method.reads_captions:
        try:
            open_training(config.scratch())
        except ConfigError as error:
            raise ConfigError(f"baseline scratch, which learns from captions: {error} Or set baseline=none.") from None
    final = open_final(config)  # first, so that a wrong name shows before the training and not after it
    state = start_processes(on_cpu=config.training.on_cpu)
    with state.main_process_first():
        resume = resume or (was_restarted() and (out / "config.yaml").exists())
        prepare_folder(out, config, resume=resume, write=state.is_main_process)
    student, trained, extra = train(config, out=out, resume=resume, console=console, title="student")
    baseline_folder: Path | None = None
    if config.baseline == "scratch":
        baseline_folder = out / "baseline"
        baseline_config = config.scratch()
        if state.is_main_process:
            with writing(out):
                baseline_folder.mkdir(exist_ok=True)
            write_yaml(baseline_folder / "config.yaml", baseline_config.plain())
        train(baseline_config, out=baseline_folder, resume=resume, console=console, title="scratch")
    elif isinstance(config.baseline, Path):
        baseline_folder = config.baseline
    if not state.is_main_process:
        wait_for_all()
        return RunResult(out, {})
    scores = measure(config, final, student, baseline_folder, teacher_scores, device=state.device, out=out)
    metrics = scores | account(config, trained, extra, final)
    write_json(out / "metrics.json", metrics)
    wait_for_all()
    if console is not None and trained.ledger.num_bad:
        console.print(printable(trained.ledger.summary()), markup=False, highlight=False)
    return RunResult(out, metrics)
