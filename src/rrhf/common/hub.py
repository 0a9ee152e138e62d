"""The Hugging Face hub's client. The token comes from `hf auth login` or HF_TOKEN, and is never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rrhf.common.errors import UserError


@contextmanager
def hub_client(repo_id: str, flag: str = "--repo", token: str | None = None) -> Iterator[Any]:
    """The hub's client; what is raised while it is used becomes a message that names the cure, without the token.

    Args:
        repo_id: what is written to.
        flag: what names it.
        token: default: that of the environment.

    Raises:
        UserError: no token, no permission, or no connection.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    token = token or get_token()
    if token is None:
        raise UserError(
            "no token for the hub: run `hf auth login`, or set HF_TOKEN to one with the right to write "
            "(huggingface.co/settings/tokens)"
        )
    disable_progress_bars()
    transport: Any = HfHubHTTPError.__mro__[1]  # what the HTTP library of this huggingface_hub raises
    try:
        yield HfApi(token=token)
    except HFValidationError as error:
        raise UserError(f"{flag} {repo_id}: {error}: give USER/NAME or ORGANISATION/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it to publish") from error
    except HfHubHTTPError as error:
        reason = (error.server_message or str(error).splitlines()[0]).replace(token, "…")
        code = error.response.status_code
        raise UserError(f"{repo_id}: the hub refused ({code}): {reason}{_cure(code, flag)}") from error
    except (transport, ConnectionError, TimeoutError) as error:
        reason = str(error).replace(token, "…")
        raise UserError(
            f"{repo_id}: cannot reach {constants.ENDPOINT}: {reason}. Check the connection "
            f"{'and HF_ENDPOINT ' if os.environ.get('HF_ENDPOINT') else ''}and run the same command again"
        ) from error


def _cure(code: int, flag: str) -> str:
    cures = {
        401: "the token is not valid (any more): run `hf auth login` again, or renew HF_TOKEN",
        403: f"the token may not write there: use one with the right to write, or another {flag}",
        404: f"the repository or its owner does not exist, or the token may not see it: check {flag}",
    }
    cure = cures.get(code)
    return f"; {cure}" if cure else ""
