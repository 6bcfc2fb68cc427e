"""What went wrong with the hub, in one line that says what to do about it."""

from __future__ import annotations

import errno
from typing import Any

from fastsd.errors import FastsdError
from fastsd.weights.hub.hub_id import HubId


def refusal(wanted: HubId, error: BaseException) -> FastsdError:
    """One line on an error of huggingface_hub's, or of what it uses."""
    from huggingface_hub import constants, errors

    seen = _causes(error)
    status = next((one.response.status_code for one in seen if isinstance(one, errors.HfHubHTTPError)), None)
    login = "`hf auth login` or HF_TOKEN"
    number = next((one.errno for one in seen if isinstance(one, OSError) and one.errno is not None), None)
    if any(isinstance(one, errors.GatedRepoError) for one in seen) or status == 403:
        said = f"it is gated; ask for access at {constants.ENDPOINT}/{wanted.repo}, then log in with {login}"
    elif any(isinstance(one, errors.RevisionNotFoundError) for one in seen):
        said = f"no revision {wanted.revision!r} in that repository; it should be a branch, a tag or a commit"
    elif any(isinstance(one, errors.RepositoryNotFoundError) for one in seen) or status in (401, 404):
        place = constants.ENDPOINT
        said = f"no such path here and no such repository at {place}; if it is private, log in with {login}"
    elif any(isinstance(one, errors.OfflineModeIsEnabled) for one in seen):
        said = f"no such path here, HF_HUB_OFFLINE is set, and it is not (or not whole) in {constants.HF_HUB_CACHE}"
    elif status is not None:
        said = f"{constants.ENDPOINT} answers {status}; try again later"
    elif number == errno.ENOSPC:
        said = f"no space is left at {constants.HF_HUB_CACHE}; make room, or set HF_HOME to a folder on another disk"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        said = f"{constants.HF_HUB_CACHE} cannot be written to; HF_HOME names another folder"
    else:
        said = (
            f"no such path here, {constants.ENDPOINT} cannot be reached or the connection broke off "
            f"({first_line(seen[-1])}), and it is not (or not whole) in {constants.HF_HUB_CACHE}; try again, "
            "what has come is kept"
        )
    return FastsdError(f"{wanted}: {said}")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from."""
    found: list[Any] = [error]
    while found[-1].__cause__ is not None and len(found) < 10:
        found.append(found[-1].__cause__)
    return found


def first_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{f': {lines[0][:120]}' if lines else ''}"
