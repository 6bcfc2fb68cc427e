"""Errors of the hub, each as one line that says what to do."""

from __future__ import annotations

import errno
from typing import Any

from fastsd.errors import FastsdError
from fastsd.weights.hub.hub_id import HubId


def hub_error(hub_id: HubId, error: BaseException) -> FastsdError:
    """The one-line error for an exception of huggingface_hub or of the libraries it uses."""
    from huggingface_hub import constants, errors

    chain = _causes(error)
    status = next((cause.response.status_code for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
    code = next((cause.errno for cause in chain if isinstance(cause, OSError) and cause.errno is not None), None)
    login = "`hf auth login` or HF_TOKEN"
    cache, endpoint = constants.HF_HUB_CACHE, constants.ENDPOINT
    if any(isinstance(cause, errors.GatedRepoError) for cause in chain) or status == 403:
        reason = f"the repository is gated; ask for access at {endpoint}/{hub_id.repo}, then log in with {login}"
    elif any(isinstance(cause, errors.RevisionNotFoundError) for cause in chain):
        reason = f"no revision {hub_id.revision!r} in that repository; it should be a branch, a tag or a commit"
    elif any(isinstance(cause, errors.RepositoryNotFoundError) for cause in chain) or status in (401, 404):
        reason = f"no such path here and no such repository at {endpoint}; if it is private, log in with {login}"
    elif any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain):
        reason = f"no such path here, HF_HUB_OFFLINE is set, and {cache} does not hold it completely"
    elif status is not None:
        reason = f"{endpoint} answers {status}; try again later"
    elif code == errno.ENOSPC:
        reason = f"no space is left at {cache}; free some, or set HF_HOME to a folder on another disk"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = f"{cache} cannot be written to; set HF_HOME to another folder"
    else:
        reason = (
            f"no such path here, {endpoint} cannot be reached or the connection broke ({first_line(chain[-1])}), and "
            f"{cache} does not hold it completely; try again, the bytes that arrived are kept"
        )
    return FastsdError(f"{reason}", path=hub_id)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those it was raised from."""
    chain: list[Any] = [error]
    while chain[-1].__cause__ is not None and len(chain) < 10:
        chain.append(chain[-1].__cause__)
    return chain


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0][:120]}' if lines else ''}"
