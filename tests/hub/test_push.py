"""A push that fails leaves nothing on the Hub that was not there; what the Hub itself fails at is tried again."""

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from hf_lop.hub.write import push
from hf_lop.hub.write.push import push_folder
from tests.hub_server import run_python, serve


def answer(status):
    return httpx.Response(status, request=httpx.Request("POST", "http://hub"))


@pytest.fixture
def attempt(monkeypatch):
    """Push to a Hub that fails so often, with a status; return what was done there."""

    def run(failures, status, *, exists, save=lambda *_: None):
        done, left = [], [failures]

        def create_repo(*_, exist_ok=False, **__):
            if exists and not exist_ok:
                raise HfHubHTTPError("there", response=answer(409))
            return type("Url", (), {"repo_id": "me/x"})

        def no_card(*_, **__):
            raise EntryNotFoundError("no card")

        def upload(_, **options):
            left[0] -= 1
            if left[0] >= 0:
                raise HfHubHTTPError("broken", response=answer(status))
            done.append(("pushed", options["repo_id"]))

        monkeypatch.setattr(push, "RETRIES", (0, 0))
        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "hf_hub_download", no_card)
        monkeypatch.setattr(HfApi, "delete_repo", lambda _, name, **__: done.append(("deleted", name)))
        monkeypatch.setattr(HfApi, "upload_folder", upload)
        try:
            push_folder(save, "me/x")
        except (HfHubHTTPError, KeyboardInterrupt) as error:
            done.append(type(error))
        return done

    return run


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(("failures", "status"), [(0, 500), (1, 502), (2, 503)])
def test_a_commit_is_tried_again(attempt, exists, failures, status):
    assert attempt(failures, status, exists=exists) == [("pushed", "me/x")]


@pytest.mark.parametrize(("failures", "status"), [(3, 500), (1, 403)])
def test_a_commit_that_fails_leaves_no_empty_repository(attempt, failures, status):
    assert attempt(failures, status, exists=False) == [("deleted", "me/x"), HfHubHTTPError]
    assert attempt(failures, status, exists=True) == [HfHubHTTPError]


def test_nor_does_a_save_that_fails(attempt):
    def save(*_):
        raise KeyboardInterrupt

    assert attempt(0, 500, exists=False, save=save) == [("deleted", "me/x"), KeyboardInterrupt]
    assert attempt(0, 500, exists=True, save=save) == [KeyboardInterrupt]


@pytest.mark.slow
def test_over_http(tmp_path):
    code = """
from huggingface_hub import HfApi
from hf_lop.hub.write.push import open_repository
options = {"private": None, "token": None, "revision": None, "create_pr": False}
with open_repository("fresh", **options) as target:
    assert target.new
with open_repository("fresh", **options) as target:
    assert not target.new
try:
    with open_repository("other", **options):
        raise KeyError
except KeyError:
    print(HfApi().repo_exists("me/fresh"), HfApi().repo_exists("me/other"))
"""
    with serve(tmp_path / "home") as hub:
        assert run_python(code, hub).split()[-2:] == ["True", "False"]
