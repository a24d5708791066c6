"""`lminf serve` as an application of Ray Serve: replicas of one server behind Ray's proxy.

    serve run lminf_export.serve.ray:app bundle=demo replicas=2 slots=8 \
        session_store=/mnt/sessions session_secret_file=session-secret

The proxy sends the requests of a session, those with the same `x-session-id`, to the same replica
while there is one; any other resumes it from the shared store. See docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from lminf_export.errors import LminfError, SessionError
from lminf_export.serve.app import create_app
from lminf_export.serve.credentials import keys_of
from lminf_export.serve.opening import named, opened
from lminf_export.serve.ray_arguments import ArgumentError, Arguments
from lminf_export.serve.ray_proxy import require_local_proxy
from lminf_export.serve.settings import ServeSettings

_HEALTH_PERIOD_SECONDS = 5.0
_HEALTH_TIMEOUT_SECONDS = 30.0
# Requests beyond its limits that a replica may hold while it refuses them, and asks for its health.
_REFUSED_AT_ONCE = 64
# Of Ray's fields.
_MOST_REQUESTS = 2**31 - 1


class Replica:
    """One server of the fleet.

    Args:
        arguments: of the application.

    Raises:
        LminfError: the bundle cannot be served, the store cannot be used, or there is no key
            although other machines reach Ray's proxy.
    """

    def __init__(self, arguments: Arguments) -> None:
        settings = arguments.settings()
        if not settings.api_keys:
            require_local_proxy()
        models = opened(
            named([arguments.bundle], [arguments.name] if arguments.name else []),
            settings,
            template=arguments.template,
            provider=arguments.provider,
            kernels=arguments.kernels,
            threads=arguments.threads,
            trust_plan=arguments.trust_hash or False,
        )
        self._serving_app = create_app(models, settings)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application, for Ray; its end closes the engines."""
        return self._serving_app

    def check_health(self) -> None:
        """Tell Ray whether the replica is to be replaced.

        Raises:
            SessionError: an engine has failed.
        """
        stats = self._serving_app.state.serving.stats()
        failed = [name for name, found in stats.items() if not found.healthy]
        if failed:
            raise SessionError(f"the engine of {', '.join(failed)} has failed")


def app(arguments: Mapping[str, Any] | Arguments) -> serve.Application:
    """Return the application, for `serve run` and `serve.run`.

    Args:
        arguments: of the deployment, and settings of each server, by their names: values, or texts
            that stand for them. Files that they name are looked at, and nothing is loaded but
            where replicas run.

    Raises:
        ArgumentError: arguments that are unknown or outside their rules, a file that cannot be
            read, or no key although other machines reach Ray's proxy.
    """
    # Ray would check an annotation of pydantic's by itself, and print a traceback.
    if not isinstance(arguments, Arguments):
        arguments = Arguments.of(arguments)
    arguments = arguments.found_here()
    try:
        if not keys_of(None, arguments.api_key_file):
            require_local_proxy()
        return _bound(arguments, arguments.settings_without_secrets())
    except (LminfError, ValueError) as error:
        # Ray's own rules, such as the precision of num_cpus.
        raise ArgumentError(str(error)) from None


def most_ongoing(settings: ServeSettings) -> int:
    """Return how many requests Ray gives one replica at once.

    More than it answers or lets wait, so that it refuses the others itself, in the API's form and
    with a time to try again, and tells of its health and counts meanwhile.
    """
    taken = max(settings.max_requests, settings.slots + settings.max_waiting)
    return min(taken + _REFUSED_AT_ONCE, _MOST_REQUESTS)


def _bound(arguments: Arguments, settings: ServeSettings) -> serve.Application:
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if arguments.max_replicas is not None and arguments.max_replicas > arguments.replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=arguments.replicas,
                initial_replicas=arguments.replicas,
                max_replicas=arguments.max_replicas,
                # Of those that run and wait: a replica whose slots are all taken is full.
                target_ongoing_requests=settings.slots,
            )
        }
    router: Any = ConsistentHashRouter
    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name="lminf",
        # What finds no slot waits in its replica, in the order in which it came.
        max_ongoing_requests=most_ongoing(settings),
        max_queued_requests=arguments.max_queued,
        graceful_shutdown_timeout_s=arguments.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=_HEALTH_TIMEOUT_SECONDS,
        request_router_config=RequestRouterConfig(request_router_class=router),
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        **scaling,
    )
    bound: serve.Application = deployment.bind(arguments)
    return bound
