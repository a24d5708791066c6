"""Where Ray's proxy listens, which an application without a key depends on."""

from __future__ import annotations

import ray
from ray.serve.context import _get_global_client

from lminf_export.errors import ConfigError, shown
from lminf_export.serve.auth import is_local


def require_local_proxy() -> None:
    """Refuse to go on where Ray's proxy is reached from other machines.

    Before Serve runs nothing is refused: who starts it decides, and replicas look again. The
    proxy's address is that of its first start, whatever later configurations say.

    Raises:
        ConfigError: naming the address.
    """
    if not ray.is_initialized():
        return
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    # None: there is no proxy for HTTP.
    host = client.http_config.host
    if host is not None and not is_local(host):
        raise ConfigError(
            f"Ray's proxy listens at {shown(host)}, where other machines reach it, which needs a "
            "key: give api_key_file, or stop Serve (serve shutdown) and start it with "
            "http_options host 127.0.0.1"
        )
