"""Parameters of S3D, which generation and on-policy training share."""

from typing import Annotated, Protocol

from pydantic import BeforeValidator, Field

from tasks.settings_base import STARTER


def _text(value: object) -> object:
    """A number without quotes, as people write it in a file or after --set, means the same."""
    return str(value) if type(value) is int else value


S3DChoice = Annotated[str, BeforeValidator(_text)]
S3D = Field(
    "off",
    title="S3D",
    description="Self-speculative decoding, which changes no candidate: off; auto: draft as many tokens as pay; "
    "or a number of tokens to draft always",
    pattern=r"^(off|auto|[0-9]|1[0-6])$",
)
S3D_ADAPTER = Field(
    STARTER, title="S3D adapter", description="Folder, models/NAME or starter, made for the policy (s3d)"
)


class DraftingConfig(Protocol):
    """A stage that decodes with S3D."""

    @property
    def s3d(self) -> str:
        """off, auto or a number."""

    @property
    def s3d_adapter(self) -> str:
        """Where it is."""
