"""The picture that says most about a finished stage, beside its summary in Prefect; it needs matplotlib."""

import base64

from storage.lake import DatasetRef, Lake
from tasks.artifacts import in_run, show_image


def show_picture(lake: Lake, ref: DatasetRef) -> None:
    """Nothing is drawn outside a Prefect run, without matplotlib, or where there is nothing to see."""
    show_pictures(lake, ref, at_most=1)


def show_pictures(lake: Lake, ref: DatasetRef, at_most: int | None = None) -> None:
    """Likewise, all that there are of the stage's table."""
    from storage.report.pictures import stage_pictures
    from storage.report.style import has_matplotlib
    from storage.report.svg import png

    pictures = stage_pictures(lake, ref) if in_run() and has_matplotlib() else []
    for picture in pictures[:at_most]:
        url = f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
        show_image(ref, url, f"{picture.title}. {picture.alt}", picture.key)
