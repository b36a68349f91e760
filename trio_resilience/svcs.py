"""Hand policies to services by svcs, the service locator (the package ``svcs``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from trio_resilience._registry import RegisteredPolicy, Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    import svcs


def register_policies(
    services: svcs.Registry,
    policies: Registry,
    named: Mapping[Any, str] | None = None,
) -> dict[Any, RegisteredPolicy]:
    """Let containers of *services* give `Registry`, and single policies by types of their own.

    All that ask for a type get the same policy, which stays valid when *policies* is reloaded.
    Nothing is registered if a name is missing.

    Args:
        services: the registry of svcs.
        policies: the registry of policies.
        named: which policy each type stands for. The types are there to tell policies apart:
            `typing.NewType`, `typing.Annotated` or an empty class.

    Returns:
        The policies, by type.

    Raises:
        KeyError: there is no policy of a name.

    Example::

        PaymentsPolicy = NewType("PaymentsPolicy", RegisteredPolicy)

        register_policies(services, policies, {PaymentsPolicy: "payments"})

        with svcs.Container(services) as container:
            policy = container.get(PaymentsPolicy)
    """
    found = {kind: policies[name] for kind, name in (named or {}).items()}
    # Its hints are incomplete.
    register = cast("Any", services).register_value
    register(Registry, policies)
    for kind, policy in found.items():
        register(kind, policy)
    return found
