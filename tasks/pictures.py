"""The picture that says most about a finished stage, beside its summary in Prefect; it needs matplotlib."""

import base64

from storage.lake import DatasetRef, Lake
from tasks.artifacts import in_run, show_image


def show_picture(lake: Lake, ref: DatasetRef) -> None:
    """Nothing is drawn outside a Prefect run, without matplotlib, or where there is nothing to see."""
    from storage.report.pictures import main_picture
    from storage.report.style import has_matplotlib
    from storage.report.svg import png

    picture = main_picture(lake, ref) if in_run() and has_matplotlib() else None
    if picture is not None:
        url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
        show_image(ref, url, f"{picture.title}. {picture.alt}", picture.key)
