"""What every test shares. No test sleeps, loops or guards against hangs by itself: it is done here, once.

    delays      the one table of delays, scaled by COHELD_TEST_SCALE: TICK, SHORT, MEDIUM, LONG, HANG
    states      wait for what can be observed: wait_until, blocked_in_futex, stopped, gone, descendants
    procs       real processes with a bounded conversation: start (by fork, spawn, forkserver), program
    exclusion   two independent detectors of overlap, shared by all workers, that also survive killed ones
    seeds       the seed of this run (COHELD_TEST_SEED) and a random.Random for each test
    effort      how thorough what is repeated is (COHELD_TEST_STRIDE): steps to be killed at, rounds
    hygiene     what a test may not leave behind: processes, files; used by the plugin
    watchdog    the hang limit: every stack of every process is dumped, then all are killed

Usual shape of a test with another process:

    from coheld.testing.support import delays, procs, states

    def hold(link, obj):                  # runs in the child; `link` is its end of the conversation
        with obj:
            link.say("holding")
            link.wait_for("go")

    def test_waiter_survives_a_killed_holder():
        obj = Lockable()
        with procs.start(hold, obj, method="fork") as holder:
            holder.expect("holding")      # bounded by delays.LONG; shows the child's traceback if it failed
            assert not obj.acquire(timeout=delays.SHORT)
            holder.kill()                 # SIGKILL, reaped; leaving the block would check that it ended well
            assert obj.acquire(timeout=delays.LONG)
            obj.release()

coheld.testing.plugin gives every test a private COHELD_DIR (fixture `coheld_dir` names it), the hang limit, and
the check that nothing is left. A test that needs longer says `@pytest.mark.hang_limit(seconds)`; the number is
scaled too. Functions that run in a spawned process stand at module level.
"""
