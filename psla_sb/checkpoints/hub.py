"""Taggers' folders as repositories on Hugging Face: `hf://owner/name`, or `hf://owner/name@revision`."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from speechbrain.utils.fetching import FetchConfig, fetch
from speechbrain.utils.logger import get_logger

from psla_sb import __version__
from psla_sb.checkpoints.run_folder import CALIBRATION, CLASSES, HPARAMS
from psla_sb.checkpoints.tagger_folder import LABEL_ENCODER, WEIGHTS
from psla_sb.errors import InputError
from psla_sb.lobes.chain import MODULES

logger = get_logger(__name__)
PREFIX = "hf://"
# Of a tagger's folder: what changes with the weights, and may be missing; and the rest, of which ontology.json is for --hierarchy.
ONNX = ("model.onnx", "model_int8.onnx")
OF_WEIGHTS = (WEIGHTS, *(f"{name}.ckpt" for name in MODULES), CALIBRATION, *ONNX)
OTHERS = (HPARAMS, LABEL_ENCODER, CLASSES, "ontology.json", "README.md")


class Address(NamedTuple):
    """A repository, and which of its revisions: a branch, a tag or a commit; None for the newest.

    Example
    -------
    >>> Address.of("hf://somebody/tagger@v1")
    Address(repository='somebody/tagger', revision='v1')
    """

    repository: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> "Address":
        """Reads `hf://owner/name@revision`; an InputError if it is not so."""
        if not (found := re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:@(.+))?", text)):
            raise InputError(f"{text}: repositories are hf://owner/name, or hf://owner/name@revision")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def download(address: str) -> Path:
    """Downloads a tagger's files, and no others, into Hugging Face's cache; returns their folder. Nothing is loaded.

    What is in the cache already is not downloaded again, and is used where the hub cannot be reached.

    Raises
    ------
    InputError
        There is no such repository or revision, it may not be read, cannot be reached, or has no tagger.
    """
    asked = Address.of(address)
    with _refusals(asked):
        wanted = [name for name in (*OF_WEIGHTS, *OTHERS) if name not in ONNX]
        folder = Path(snapshot_download(asked.repository, revision=asked.revision, allow_patterns=wanted))
    if not (folder / HPARAMS).is_file():
        raise InputError(f"{asked}: not a tagger's repository, it has no {HPARAMS}; psla-export RUN --push owner/name makes one")
    return folder


def push(folder: str | Path, repository: str, private: bool = False) -> Address:
    """Uploads a tagger's folder, and nothing else that is in it, as one commit; makes the repository if there is none.

    Files of weights that are no longer what the folder has are deleted there. Returns the address of the commit.

    Arguments
    ---------
    repository
        Such as `owner/name`.
    private
        Makes the repository one that only its owner sees; one that others can see already is refused.

    Raises
    ------
    InputError
        There is no token, it may not write there, or the hub cannot be reached.
    """
    asked, api = Address.of(PREFIX + repository.removeprefix(PREFIX)), HfApi()
    if asked.revision:
        raise InputError(f"{asked}: what is pushed is a revision of its own; give owner/name")
    if get_token() is None:
        raise InputError(f"{asked}: there is no token to write with: log in with `hf auth login`, or set HF_TOKEN")
    with _refusals(asked):
        api.create_repo(asked.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(asked.repository).private:
            raise InputError(f"{asked}: is there already, and public: make it private in its settings, or choose another name")
        files = {file.name: file for file in sorted(Path(folder).iterdir()) if file.name in (*OF_WEIGHTS, *OTHERS)}
        old = {*OF_WEIGHTS} & {*api.list_repo_files(asked.repository)} - files.keys()
        # one commit: nobody finds thresholds of other weights
        changes: list[CommitOperationAdd | CommitOperationDelete]
        changes = [CommitOperationAdd(name, file) for name, file in files.items()]
        changes += [CommitOperationDelete(name) for name in sorted(old)]
        commit = api.create_commit(asked.repository, changes, commit_message=f"A tagger of psla_sb {__version__}")
    return asked._replace(revision=commit.oid)


def with_calibration(source: str | Path, savedir: str | Path | None = None, fetch_config: FetchConfig | None = None) -> Path:
    """Where the `calibration.json` of a tagger that SpeechBrain has loaded would be; it is fetched as the tagger's files were."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            return Path(fetch(CALIBRATION, str(source), savedir, fetch_config=fetch_config or FetchConfig())).parent
        except LocalEntryNotFoundError:
            logger.warning("%s of %s cannot be fetched: if it has thresholds, they are not used", CALIBRATION, source)
        # of a web address it is a ValueError
        except (EntryNotFoundError, ValueError):
            pass
    return folder


@contextlib.contextmanager
def _refusals(asked: Address) -> Iterator[None]:
    """Turns what the library raises into one InputError that says what to do."""
    page = f"{constants.ENDPOINT}/{asked.repository}"
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{asked}: {error}") from None
    except GatedRepoError:
        raise InputError(f"{asked}: its owners ask first: accept their terms at {page}, and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{asked}: there is no such repository ({page}), or not for you: check the name, or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{asked}: the repository has no such revision; {page}/tree/main lists its branches and tags") from None
    except LocalEntryNotFoundError as error:
        revision = f" --revision {asked.revision}" if asked.revision else ""
        command = f"hf download {asked.repository}{revision} --local-dir FOLDER"
        reason = _said(error.__cause__ or error)
        raise InputError(
            f"{asked}: {constants.ENDPOINT} cannot be reached, and it is not in the cache as a whole ({reason}). Where it can be "
            f"reached, `{command}` makes a folder, which can be given in place of the address"
        ) from None
    except HfHubHTTPError as error:
        may = "; log in with a token that may do this: `hf auth login`" if error.response.status_code in (401, 403) else ""
        raise InputError(f"{asked}: {page} refused ({_said(error)}){may}") from None
    except (HTTPError, OSError, RuntimeError) as error:
        # RuntimeErrors are of uploads
        raise InputError(f"{asked}: {constants.ENDPOINT} cannot be reached ({_said(error.__cause__ or error)})") from None


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
