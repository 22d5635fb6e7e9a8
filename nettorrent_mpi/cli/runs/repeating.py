"""This module says in HTML how to repeat a run: every command from its beginning on, with ranks, configuration and
environment."""

from __future__ import annotations

from html import escape

from nettorrent_mpi.cli.runs.comparing import Setting, as_written, differ, settings_given
from nettorrent_mpi.cli.runs.run_data import RunData
from nettorrent_mpi.cli.runs.run_parts import RunPart
from nettorrent_mpi.cli.runs.values import is_count, text

MOST_PARTS = 40  # that are shown whole


def how_to_repeat(run: RunData) -> str:
    """Say how each part of the run began, in their order."""
    parts = run.parts
    if len(parts) == 1 and parts[0].first == 1:
        told = _began(parts[0]) + _configuration(parts[0], None)
        return told or "<p>The folder does not say how the run was started.</p>"
    several = f"The run has {len(parts)} parts; " if len(parts) > 1 else "The run "
    each = "each goes on from the state of the one before" if len(parts) > 1 else "goes on from another one's state"
    told = f"<p>{several}{each}. To repeat it, run all of this in order.</p>"
    done, before = 0, None
    for part in parts:
        if part.first > done + 1:
            told += f"<p>Of steps {done + 1:,} to {part.first - 1:,} the folder does not say how they were trained.</p>"
        if part.number <= MOST_PARTS or part is parts[-1]:
            told += f"<h3>{escape(part.name.capitalize())}</h3>{_goes_on(part)}{_began(part)}{_ended(part, parts)}"
            told += _configuration(part, before)
        done, before = part.last, part
    if len(parts) > MOST_PARTS + 1:
        told += f"<p>Parts {MOST_PARTS + 1} to {len(parts) - 1} are in run.json.</p>"
    return told


def _goes_on(part: RunPart) -> str:
    """Say where its state came from."""
    lost, source = (text(part.about.get(name)) for name in ("lost", "source"))
    if lost:
        stop = f"stop the part before after step {part.first - 1:,} with a checkpoint (the signal USR1)"
        return (
            f"<p>The run went on by itself: {escape(lost)}. To repeat it, {stop}, and start this with "
            f"<code>--resume</code>:</p>"
        )
    if part.first == 1:
        return ""
    return f"<p>Goes on after step {part.first - 1:,}, from <code>{escape(source)}</code>:</p>"


def _began(part: RunPart) -> str:
    """Show the command, where it was given, and what it ran on."""
    if not part.command:
        return ""
    folder = text(part.about.get("folder"))
    told = f"<p>In <code>{escape(folder)}</code>:</p>" if folder else ""
    told += f"<pre>{escape(part.command)}</pre>"
    about = {name: text(part.about.get(name)) for name in ("version", "commit", "python", "numpy", "mpi", "processor")}
    commit = f" (commit {about['commit']})" if about["commit"] else ""
    seed = part.about.get("seed")
    words = [
        f"on {part.where}" if part.where else "",
        f"seed {seed}" if is_count(seed, least=0) else "",
        f"nettorrent_mpi {about['version']}{commit}" if about["version"] else "",
        f"Python {about['python']}" if about["python"] else "",
        f"NumPy {about['numpy']}" if about["numpy"] else "",
        about["mpi"],
        about["processor"],
    ]
    known = "; ".join(filter(None, words))
    return told + (f"<p>{escape(known)}</p>" if known else "")


def _ended(part: RunPart, parts: list[RunPart]) -> str:
    """Say where a part ended short of its own last step."""
    steps = part.about.get("steps")
    if part is parts[-1] or not is_count(steps) or steps <= part.last:
        return ""
    if text(parts[part.number].about.get("lost")):
        return ""
    by = "was stopped" if part.about.get("ended") == "stopped" else "did not go on"
    return (
        f"<p>It {by} after step {part.last:,} of {steps:,}. To repeat it, stop it there by the signal USR1, or let it "
        f"run on, and have the next part name the checkpoint after that step: <code>--resume FOLDER</code>.</p>"
    )


def _configuration(part: RunPart, before: RunPart | None) -> str:
    """Show the complete configuration, or in what it differs from that of the part before."""
    if not part.config:
        return ""
    changed, none = [], Setting("-")
    if before is not None and before.settings:
        if part.settings == before.settings:
            return f"<p>The configuration is that of part {before.number}.</p>"
        then, now = (settings_given(each.config, f"the configuration of part {each.number}") for each in (before, part))
        if then is None or now is None:
            then, now = as_written(before.settings), as_written(part.settings)
        changed = [
            f"{key}: {now.get(key, none).text} (before: {then.get(key, none).text})"
            for key in dict.fromkeys([*then, *now])
            if differ([then.get(key), now.get(key)])
        ]
    told = f"<p>Its configuration differs: {escape('; '.join(changed))}</p>" if changed else ""
    name = "config.yaml" if before is None and part.first == 1 else f"The configuration of part {part.number}"
    return f"{told}<details><summary>{name}, complete</summary><pre>{escape(part.config)}</pre></details>"
