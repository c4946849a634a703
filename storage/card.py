"""The dataset card of a version: YAML that `datasets.load_dataset(DIRECTORY)` understands, and a summary."""

import json

from storage.manifest import Manifest

_MAIN_TABLE = {"prompts": "prompts", "candidates": "candidates", "preferences": "preferences"}
_NOT_LISTED = {"rejected"}


def render_card(manifest: Manifest) -> str:
    """README.md of a version."""
    return f"---\n{_front_matter(manifest)}---\n\n{_body(manifest)}"


def _front_matter(manifest: Manifest) -> str:
    licence = manifest.config.get("license")
    lines = [f"license: {json.dumps(licence)}"] if licence else []
    if manifest.kind == "preferences":
        lines += ["tags:", "- preference", "- dpo"]
        # Imported pairs were there before; whether people or models wrote them is the source's to say.
        lines += [] if manifest.stage == "import" else ["- synthetic"]
    tables = sorted({file.table for file in manifest.files if file.table and file.rows} - _NOT_LISTED)
    if tables:
        lines.append("configs:")
    for table in tables:
        lines.append(f"- config_name: {table}")
        if table == _MAIN_TABLE.get(manifest.kind):
            lines.append("  default: true")
        lines.append("  data_files:")
        for split in sorted({str(file.split) for file in manifest.shards(table) if file.rows}):
            lines += [f"  - split: {split}", f"    path: {table}/{split}-*.parquet"]
    return "".join(f"{line}\n" for line in lines)


def _body(manifest: Manifest) -> str:
    shards = [file for file in manifest.files if file.table]
    tables = sorted({(str(file.table), str(file.split)) for file in shards})
    rows = "".join(
        f"| {table} | {split} | {sum(f.rows or 0 for f in manifest.shards(table, split))} |\n"
        for table, split in tables
    )
    inputs = "".join(f"- {role}: `{ref}`\n" for role, ref in sorted(manifest.inputs.items())) or "- none\n"
    return (
        f"# {manifest.kind}/{manifest.name}\n\n"
        f"Version `{manifest.version}`, made by the stage `{manifest.stage}` of Winnow.\n\n"
        + (f"| table | split | rows |\n|---|---|---|\n{rows}\n" if rows else "")
        + f"## Made from\n\n{inputs}\n"
        f"Command: `{manifest.command}`\n\n"
        f"## Configuration\n\n```json\n{json.dumps(manifest.config, indent=2, sort_keys=True)}\n```\n\n"
        f"## Statistics\n\n```json\n{json.dumps(manifest.stats, indent=2, sort_keys=True)}\n```\n"
    )
