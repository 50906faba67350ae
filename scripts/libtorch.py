#!/usr/bin/env python3
"""Makes libtorch 2.11.0 available and points `.libtorch` in the repository at it.

In this order:
1. $LIBTORCH, if set;
2. a PyTorch 2.11.0 that this Python can import;
3. the copy in the user's cache, made if need be from three PyPI wheels.

Of the wheels only what computing on the CPU needs is transferred, about 150 MB: the ZIP directory at a
wheel's end says where each member lies, and HTTP ranges bring those members. Each member must have the
hash that the wheel's RECORD gives it, and RECORD the hash given below. Where an index serves no ranges,
the whole wheel comes and must have its hash. A transfer that was cut off goes on where it stopped.

pip is asked where the wheels are, so that its configuration (index, proxy, certificates) holds.
Standard library only, Python 3.9 or newer. Nothing is printed when there is nothing to do.
"""

import base64
import csv
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile

VERSION = "2.11.0"
ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = ROOT / ".libtorch"
ROOM_NEEDED = 900 << 20
TIMEOUT_S = 60
TRIES = 5


class Wheel:
    """A wheel: what to ask pip for, its hash, the hash of its RECORD, and which members are wanted."""

    def __init__(self, requirement, sha256, record_sha256, wanted):
        self.requirement, self.sha256, self.record_sha256 = requirement, sha256, record_sha256
        self.wanted = re.compile(wanted)


WHEELS = [
    Wheel(
        "torch==2.11.0",
        "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        "86b11de9e81e378fe38d68644e581b98c138494d67197b94ba12eade2be836e7",
        r"torch/(include/.*|version\.py|lib/(libc10|libtorch|libtorch_cpu)\.so|lib/libgomp\.so\.1)"
        r"|torch-[^/]*/licenses/.*",
    ),
    Wheel(
        "nvidia-cuda-runtime==13.0.96",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        "34c7a65651597fd8a376b049b69bb26db399a9ea443a7a142ccd34f5a10f79c4",
        r"nvidia/cu13/lib/libcudart\.so\.13|.*/licenses/.*",
    ),
    Wheel(
        "nvidia-cuda-cupti==13.0.85",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        "f8ae8ddce85f8e319abac90e956bf45a572e31f4ff01af2d634f37aa3d78e3eb",
        r"nvidia/cu13/lib/libcupti\.so\.13|.*/licenses/.*",
    ),
]


class Problem(Exception):
    """Something a person must do something about."""


class WrongHash(Problem):
    """What came is not what it should be; none of it is kept."""


def say(text):
    print(f"libtorch: {text}", file=sys.stderr, flush=True)


# ---- What is there ----


def version_of(torch):
    """The version of a libtorch or PyTorch folder, without its build tag; None if it says none."""
    try:
        text = (torch / "version.py").read_text()
        found = re.search(r"__version__\s*=\s*['\"]([^'\"+]+)", text)
        return found.group(1) if found else None
    except OSError:
        pass
    try:
        return (torch / "build-version").read_text().strip().split("+")[0]
    except OSError:
        return None


def usable(torch):
    return (
        version_of(torch) == VERSION
        and (torch / "lib" / "libtorch_cpu.so").exists()
        and (torch / "include" / "torch" / "csrc" / "distributed" / "c10d" / "ProcessGroupGloo.hpp").exists()
    )


def importable_torch():
    """The folder of the PyTorch that this Python would import, without importing it."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


def point_at(torch):
    """Makes `.libtorch` a link to `torch`, replacing any other link in one step."""
    torch = torch.resolve()
    if LINK.is_symlink() and pathlib.Path(os.readlink(LINK)) == torch:
        return
    if LINK.exists() and not LINK.is_symlink():
        raise Problem(f"{LINK} is in the way and not a link: remove it")
    fresh = LINK.with_name(f".libtorch.{os.getpid()}")
    os.symlink(torch, fresh)
    os.replace(fresh, LINK)


# ---- Fetching ----


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=1800)
    except subprocess.TimeoutExpired:
        raise Problem("pip did not answer within 30 minutes; check the network and its configuration")


def targets():
    """Options that make pip choose the Linux wheels of CPython 3.11, whatever Python this is."""
    names = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 16, -1)] + ["manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11"]
    for name in names:
        options += ["--platform", name]
    return options


def locate(wheels):
    """Where the index has the wheels: requirement -> URL. None when this pip cannot say."""
    with tempfile.TemporaryDirectory() as nowhere:
        answer = pip(
            "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", "--target", nowhere,
            *targets(), *(wheel.requirement for wheel in wheels),
        )
    if answer.returncode != 0:
        if "No module named pip" in answer.stderr:
            raise Problem("this Python has no pip: install it (python3 -m ensurepip, or the package python3-pip)")
        if "No matching distribution" in answer.stderr or "Could not find" in answer.stderr:
            lines = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
            raise Problem(f"pip finds no such wheel (is its index reachable?): {' '.join(lines[-1:])}")
        return None
    places = {}
    for item in json.loads(answer.stdout)["install"]:
        url, info = item["download_info"]["url"], item["metadata"]
        places[f"{info['name'].lower()}=={info['version'].split('+')[0]}"] = url
    return {wheel.requirement: places[wheel.requirement] for wheel in wheels}


def ssl_context():
    """Certificates as pip is told to use them."""
    path = os.environ.get("PIP_CERT")
    if not path:
        path = pip("config", "get", "global.cert").stdout.strip()
    return ssl.create_default_context(cafile=path if path and os.path.isfile(path) else None)


class Progress:
    """One line on a terminal, a line every tenth elsewhere."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.next = what, max(total, 1), 0, 0.0
        self.begun = time.monotonic()

    def add(self, count):
        self.done += count
        part = self.done / self.total
        step = 0.005 if sys.stderr.isatty() else 0.1
        if part < self.next and self.done < self.total:
            return
        self.next = part + step
        rate = self.done / max(time.monotonic() - self.begun, 1e-3) / 1e6
        text = f"libtorch: {self.what} {self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB ({rate:.0f} MB/s)"
        end = "\r" if sys.stderr.isatty() and self.done < self.total else "\n"
        print(text, end=end, file=sys.stderr, flush=True)


class NoRanges(Exception):
    """The server sends whole files only."""


class Remote:
    """A wheel on a server, filled in piece by piece in a local file of the same size."""

    def __init__(self, url, part, context):
        self.url, self.part, self.context = url, part, context
        self.journal = part.with_suffix(".ranges")
        self.name = url.rsplit("/", 1)[-1].split("#")[0]

    def open(self, start, end):
        """A response for bytes start..end (exclusive); start None: the last `end` bytes."""
        value = f"bytes=-{end}" if start is None else f"bytes={start}-{end - 1}"
        request = urllib.request.Request(self.url, headers={"Range": value, "User-Agent": "duet-setup"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self.context)
        if response.status != 206:
            response.close()
            raise NoRanges()
        return response

    def have(self):
        """Bytes already here, as {start: end}."""
        try:
            return {int(a): int(b) for a, b in (line.split() for line in self.journal.read_text().splitlines())}
        except (OSError, ValueError):
            return {}

    def fetch(self, start, end, progress):
        """Brings bytes start..end, going on where an earlier try stopped."""
        at = min(self.have().get(start, start), end)
        progress.add(at - start)
        tries = 0
        while at < end:
            try:
                with self.open(at, end) as response, open(self.part, "r+b") as file:
                    file.seek(at)
                    while at < end:
                        piece = response.read(1 << 20)
                        if not piece:
                            break
                        file.write(piece)
                        at += len(piece)
                        progress.add(len(piece))
            except (urllib.error.URLError, OSError) as error:
                if getattr(error, "errno", None) == errno.ENOSPC or isinstance(error, urllib.error.HTTPError):
                    raise
                tries += 1
                if tries == TRIES:
                    raise Problem(f"{self.name}: {error} ({TRIES} times); run again to go on from here")
                time.sleep(2**tries)
            finally:
                with open(self.journal, "a") as journal:
                    journal.write(f"{start} {at}\n")

    def directory(self):
        """Makes the local file as long as the remote one, with the ZIP directory in place."""
        with self.open(None, 2 << 20) as response:
            tail = response.read()
            total = int(response.headers["Content-Range"].rsplit("/", 1)[-1])
        if not self.part.exists() or self.part.stat().st_size != total:
            self.journal.unlink(missing_ok=True)
            with open(self.part, "wb") as file:
                file.truncate(total)
        with open(self.part, "r+b") as file:
            file.seek(total - len(tail))
            file.write(tail)
        return total - len(tail)


def spans(members, wanted, limit):
    """Byte ranges that hold the wanted members; ranges that nearly touch are one."""
    order = sorted(members, key=lambda info: info.header_offset)
    ranges = []
    for info, after in zip(order, order[1:] + [None]):
        if not wanted(info.filename):
            continue
        start, end = info.header_offset, after.header_offset if after else limit
        end = min(end, limit)
        if start >= end:
            continue
        if ranges and start - ranges[-1][1] < 256 << 10:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    return ranges


def is_record(name):
    return name.endswith(".dist-info/RECORD")


def fetch_members(wheel, url, folder, context):
    """Brings the wanted members of a wheel. Gives the local file, full of holes elsewhere."""
    part = folder / f"{wheel.sha256[:16]}.part"
    remote = Remote(url, part, context)
    limit = remote.directory()
    with zipfile.ZipFile(part) as archive:
        ranges = spans(archive.infolist(), lambda n: is_record(n) or wheel.wanted.fullmatch(n), limit)
    progress = Progress(wheel.requirement, sum(end - start for start, end in ranges))
    for start, end in ranges:
        remote.fetch(start, end, progress)
    return part


def fetch_whole(wheel, folder):
    """Has pip bring the whole wheel. Gives the local file, its hash checked."""
    say(f"{wheel.requirement}: fetching the whole wheel with pip")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        listed = pathlib.Path(place) / "requirements.txt"
        listed.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        answer = pip("download", "--require-hashes", "-d", place, *targets(), "-r", str(listed))
        found = list(pathlib.Path(place).glob("*.whl"))
        if answer.returncode != 0 or len(found) != 1:
            raise Problem(f"pip download {wheel.requirement}: {answer.stderr.strip().splitlines()[-1:]}")
        part = folder / f"{wheel.sha256[:16]}.whl"
        os.replace(found[0], part)
    return part


def unpack(wheel, path, to):
    """Takes the wanted members out of a wheel, each checked against RECORD, and RECORD against its pin."""
    with zipfile.ZipFile(path) as archive:
        record = next(name for name in archive.namelist() if is_record(name))
        listing = archive.read(record)
        if hashlib.sha256(listing).hexdigest() != wheel.record_sha256:
            raise WrongHash(f"{wheel.requirement}: the wheel is not the one this project was made for")
        hashes = {row[0]: row[1] for row in csv.reader(listing.decode().splitlines()) if row}
        for info in archive.infolist():
            name = info.filename
            if info.is_dir() or not wheel.wanted.fullmatch(name):
                continue
            target = to / name
            if not target.resolve().is_relative_to(to.resolve()):
                raise Problem(f"{wheel.requirement}: `{name}` lies outside of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with archive.open(info) as source, open(target, "wb") as file:
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
            found = "sha256=" + base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
            if hashes.get(name) != found:
                raise WrongHash(f"{wheel.requirement}: `{name}` does not have the hash that RECORD gives it; run again")


def fetch(cache, final):
    """Fills the cache."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Problem(f"only Linux on x86-64 is fetched for: set LIBTORCH to a folder with libtorch {VERSION}")
    if shutil.disk_usage(cache).free < ROOM_NEEDED:
        raise Problem(f"{cache} has less than {ROOM_NEEDED >> 20} MiB free: make room or set XDG_CACHE_HOME")
    say(f"fetching libtorch {VERSION} into {cache}")
    places, context = locate(WHEELS), ssl_context()
    parts = cache / "parts"
    parts.mkdir(exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=".unpacking-", dir=cache))
    try:
        for wheel in WHEELS:
            path = None
            url = (places or {}).get(wheel.requirement, "")
            if url.startswith("http"):
                try:
                    path = fetch_members(wheel, url, parts, context)
                    unpack(wheel, path, fresh)
                    continue
                except (NoRanges, urllib.error.HTTPError, zipfile.BadZipFile) as error:
                    say(f"{wheel.requirement}: no partial transfer ({error or type(error).__name__})")
                    shutil.rmtree(parts)
                    parts.mkdir()
            unpack(wheel, fetch_whole(wheel, parts), fresh)
        fresh.chmod(0o755)
        if final.exists():
            shutil.rmtree(final)
        os.replace(fresh, final)
        shutil.rmtree(parts, ignore_errors=True)
    except WrongHash:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    say(f"ready in {final}")


def cached():
    """The copy in the user's cache, made if it is not there. Runs beside this one wait for it."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "duet"
    final = base / f"libtorch-{VERSION}"
    if usable(final / "torch"):
        return final / "torch"
    base.mkdir(parents=True, exist_ok=True)
    with open(base / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is fetching it: waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not usable(final / "torch"):
            for left in base.glob(".unpacking-*"):
                shutil.rmtree(left, ignore_errors=True)
            fetch(base, final)
    return final / "torch"


def main():
    chosen = os.environ.get("LIBTORCH")
    # `cargo` itself sets LIBTORCH to the link that this script makes.
    if chosen and pathlib.Path(chosen).absolute() != LINK:
        torch = pathlib.Path(chosen)
        if not usable(torch):
            found = version_of(torch) or "no version"
            raise Problem(f"LIBTORCH={chosen} has {found}, not libtorch {VERSION} with its headers: fix or unset it")
        point_at(torch)
        return
    installed = importable_torch()
    if installed and usable(installed):
        point_at(installed)
        return
    if not installed and LINK.is_symlink() and usable(LINK):
        return
    point_at(cached())


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        say(str(problem))
        sys.exit(1)
    except OSError as problem:
        say(f"{problem.strerror}: {problem.filename}" if problem.filename else str(problem))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; run again to go on from here")
        sys.exit(130)
