from __future__ import annotations
import gc, weakref, traceback
from functools import partial
import pytest, trio
from tests.operations import leaves
from tests.test_concurrency_interrupts import Tripwire
from trio_resilience import *
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience.testing import Scenario, cancel_everywhere, pause

async def op(): await trio.lowlevel.checkpoint()
async def bad():
    await trio.lowlevel.checkpoint(); raise OSError("x")

async def job(br):
    for _ in range(2):
        try: await br.call(op)
        except CircuitOpenError: pass
        except CallAbandonedError: pass
        try:
            async with br.guard() as g:
                await trio.lowlevel.checkpoint(); g.set_result(1)
        except CircuitOpenError: pass
        except CallAbandonedError: pass
        try: await br.call(bad)
        except (OSError, CircuitOpenError, CallAbandonedError): pass
        await trio.sleep(1)

OPTS=[dict(), dict(failure_rate=.5, window_seconds=3, min_calls=2), dict(cancel_in_flight=True), dict(enforce=False), dict(failure_result=lambda r: False)]
@pytest.mark.watchdog(300)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("opts", OPTS)
@pytest.mark.parametrize("listened", [False, True])
def test_ctrl_c(opts, listened):
    problems=[]
    def scenario(found):
        async def main():
            br = CircuitBreaker(failure_threshold=1, recovery_timeout=1, half_open_max_calls=2, **opts)
            try:
                async with trio.open_nursery() as n:
                    n.start_soon(job, br); n.start_soon(job, br)
                    if listened:
                        with subscribe(lambda e: None): await job(br)
                    else: await job(br)
            finally:
                s = br.statistics()
                rule = br._circuit.rule; run = br._circuit.runs.peek()
                if s.in_flight or (rule.state.value=="half_open" and rule._probing) or (run and run.scopes):
                    found.append(f"lost: {s} {rule._probing} {run.scopes}")
        return main
    whole=Tripwire(at=-1)
    assert whole.trace(scenario(problems)) is None
    for line in range(1, whole.lines+1):
        found, wire = [], Tripwire(at=line)
        error = wire.trace(scenario(found))
        kinds = [] if error is None else [type(l) for l in leaves(error)]
        if wire.where and kinds != [KeyboardInterrupt]: found.append(f"out: {error!r}")
        problems += [f"{wire.where}: {e}" for e in found]
    assert not problems, "\n".join(sorted(set(problems)))

async def prober(br):
    async with trio.open_nursery() as n:
        await n.start(br.keep_probing, op)
        await job(br)
        n.cancel_scope.cancel()

@pytest.mark.watchdog(200)
@pytest.mark.parametrize("opts", OPTS)
@pytest.mark.parametrize("victim", ["call", "guard", "probe", "refused", "prober"])
def test_cancel(opts, victim):
    def make():
        br = CircuitBreaker(failure_threshold=1, recovery_timeout=1, **opts)
        async def by_guard():
            async with br.guard(): await pause(2)
        async def call(nursery):
            if victim in ("probe", "refused", "prober"):
                try: await br.call(bad)
                except OSError: pass
            if victim in ("probe",): await trio.sleep(1)
            if victim == "prober":
                with trio.move_on_after(3): await br.keep_probing(pause)
            elif victim == "guard": await by_guard()
            else: await br.call(partial(pause, 2))
        def check():
            s = br.statistics(); rule = br._circuit.rule
            assert s.in_flight == 0
            if rule.state.value == "half_open": assert rule._probing == 0
            assert s.failures <= 1
        return Scenario(call, others=[], invariant=check, expected=(CircuitOpenError,))
    print(cancel_everywhere(make, seeds=range(2)))

def depth(e): return len(list(traceback.walk_tb(e.__traceback__)))
async def test_rejections():
    br = CircuitBreaker(failure_threshold=1)
    class Local: pass
    refs=[]
    gc.collect(); gc.disable()
    try:
        async def f():
            l = Local(); refs.append(weakref.ref(l))
            raise OSError(l)
        async def one():
            try: await br.call(f)
            except OSError: pass
        await one()
        assert refs[0]() is None
        errs=[]
        for i in range(1000):
            local=Local(); r=weakref.ref(local)
            try: await br.call(f)
            except CircuitOpenError as e: errs.append(id(e)); d=depth(e); assert e.__context__ is None; er = weakref.ref(e)
            assert er() is None
            del local
            assert r() is None
        print(d)
        ref = weakref.ref(br)
        g = br.guard()
        i = br.isolate(); i.release()
        del br, g, i, one
        assert ref() is None
    finally: gc.enable()

@pytest.mark.parametrize("how", ["call","guard"])
async def test_abandoned_no_cycle(how):
    gc.collect(); gc.disable()
    try:
        br = CircuitBreaker(failure_threshold=1, cancel_in_flight=True)
        refs=[]
        class Local: pass
        async def hang():
            l = Local(); refs.append(weakref.ref(l)); await trio.sleep_forever()
        async def one():
            try:
                if how=="call": await br.call(hang)
                else:
                    async with br.guard(): await hang()
            except CallAbandonedError as e: assert depth(e) < 6
        async with trio.open_nursery() as n:
            n.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            try: await br.call(bad)
            except OSError: pass
        assert refs[0]() is None
    finally: gc.enable()
