"""A PostgreSQL server for tests: Debian's, in a folder of its own, reached through a socket there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

NO_POSTGRES = "PostgreSQL's server is not installed: `apt-get install postgresql`"


def postgres_programs() -> Path | None:
    """Where initdb and pg_ctl are; Debian does not put them on the path."""
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "pg_ctl").exists()), None)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Yield the URL of a new server's empty database.

    Raises:
        FileNotFoundError: no server is installed.
    """
    programs = postgres_programs()
    if programs is None:
        raise FileNotFoundError(NO_POSTGRES)
    folder = Path(tempfile.mkdtemp(prefix="rrhf-pg-"))
    user = None
    if os.getuid() == 0:  # the server does not run as root
        user = "nobody"
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        subprocess.run(
            [programs / command[0], *command[1:]], check=True, cwd=folder, user=user, stdout=subprocess.DEVNULL
        )

    data = str(folder / "data")
    run("initdb", "--auth=trust", "--username=rrhf", "--encoding=UTF8", "--locale=C", "--no-sync", data)
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
    run("pg_ctl", "-D", data, "-w", "-t", "300", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql://rrhf@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)
