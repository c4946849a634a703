"""Every error a user can cause in `runtime/`. The message is one line that names the value and the fix.

WinnowError
├── ConfigError        a setting that cannot work (candidates above max_rows, top_p of 0)
│   └── UnreachableError  a server that does not answer; another attempt may succeed
├── InputError         a row that cannot be used
│   └── PromptTooLong  prompt + max_new_tokens above the model's context
└── ModelError         a model folder or architecture that cannot be used
    ├── TemplateError  a chat template that renders a prompt differently once it is answered
    └── BundleError    an edge bundle that is damaged, of another version, or not one
"""


class WinnowError(Exception):
    """Base of every error raised on purpose by `runtime/`."""


class ConfigError(WinnowError):
    """A setting, or a combination of settings, that cannot work."""


class UnreachableError(ConfigError):
    """A server that does not answer now."""


class InputError(WinnowError):
    """An input row that cannot be used."""


class PromptTooLong(InputError):
    """Prompt and new tokens together do not fit the model's context."""


class ModelError(WinnowError):
    """A model or tokenizer that is missing, broken or not supported."""


class TemplateError(ModelError):
    """A chat template under which the prompt is no prefix of the conversation."""


class BundleError(ModelError):
    """A bundle that is damaged, of another version, or not one."""
