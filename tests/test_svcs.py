"""Services get their policies by svcs, or by their constructors."""

from __future__ import annotations

from typing import Annotated, Any, NewType, cast

import attrs
import pytest
import svcs

from tests.operations import returns
from trio_resilience import Retry
from trio_resilience._registry import RegisteredPolicy, Registry
from trio_resilience.svcs import register_policies

PaymentsPolicy = NewType("PaymentsPolicy", RegisteredPolicy)
SearchPolicy = Annotated[RegisteredPolicy, "search"]


def load(attempts: int = 3) -> Registry:
    retry = {"max_attempts": attempts}
    return Registry.load({"policies": {"payments": {"retry": retry}, "search": {}}})


def test_a_container_gives_the_registry_and_policies_by_their_types() -> None:
    """The same ones that the registry has."""
    services, policies = svcs.Registry(), load()
    named = register_policies(
        services, policies, {PaymentsPolicy: "payments", SearchPolicy: "search"}
    )
    assert named == {PaymentsPolicy: policies["payments"], SearchPolicy: policies["search"]}
    with svcs.Container(services) as container:
        assert container.get_abstract(Registry) is policies
        assert container.get_abstract(PaymentsPolicy) is policies["payments"]
        assert container.get_abstract(SearchPolicy) is policies["search"]


def test_a_name_that_is_missing_is_found_out_when_it_is_registered() -> None:
    """And nothing is registered by half."""
    services = svcs.Registry()
    with pytest.raises(KeyError, match="did you mean `payments`"):
        register_policies(services, load(), {SearchPolicy: "search", PaymentsPolicy: "paymnts"})
    assert not any(kind in services for kind in cast("list[type]", [Registry, SearchPolicy]))


@attrs.frozen
class Payments:
    """A service that does not know where its policy comes from."""

    policy: RegisteredPolicy

    async def pay(self, amount: int) -> int:
        return await self.policy.call(returns, amount)


async def test_a_service_gets_its_policy_and_keeps_it_over_a_reload() -> None:
    """From a factory of svcs, or from whoever calls its constructor."""
    services, policies = svcs.Registry(), load()
    register_policies(services, policies, {PaymentsPolicy: "payments"})

    def make(svcs_container: svcs.Container) -> Payments:
        return Payments(svcs_container.get_abstract(PaymentsPolicy))

    cast("Any", services).register_factory(Payments, make)
    with svcs.Container(services) as container:
        located = container.get(Payments)
    passed = Payments(policies["payments"])
    policies.reload({"policies": {"payments": {"retry": {"max_attempts": 7}}}})
    for service in (located, passed):
        assert await service.pay(5) == 5
        (retry,) = [each for each in service.policy.pipeline.layers if isinstance(each, Retry)]
        assert retry.max_attempts == 7
