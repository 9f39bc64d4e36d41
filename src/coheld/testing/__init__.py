"""The contract of a backend, as tests that anybody can run on the coheld that is installed::

    $ pip install 'coheld[contract]'
    $ COHELD_BACKEND=file: python -m coheld.testing                      # all of it
    $ COHELD_BACKEND=file: python -m coheld.testing contract/test_death.py -k fork

Arguments are pytest's; paths are those of this package.  It needs Linux, and takes some minutes.  Without
COHELD_BACKEND it is the default backend of this machine that is tested; the header of the run says which that is, and
why it runs without the C extension, if it does.  The exit status is pytest's.  What is in here::

    contract/      what every backend has to do: one caller at a time, re-entry, time-outs, names and their removal,
                   pickles, forks, errors, owners that are killed between any two steps
    state/         shared fields, guards and waits: what others see, what a kill leaves, growth, schemas
    callers/       tasks of asyncio, readers, semaphores and pools
    conformance/   what CPython's own tests ask of a recursive lock and of a bounded semaphore
    support/       processes that are really killed, detectors of overlap, the hang limit; for other tests, too
    plugin.py      what holds for each test: a directory of its own, nothing left behind, warnings are errors

What only some backends can give they declare: ``CAPABILITIES``, a ``coheld.backends.base.Capabilities``.  What is not
there as a whole (reading calls, named semaphores, files of its own on this machine) is refused by name, which
contract/test_capabilities.py sees to; tests of nothing else are then left out by that declaration, and say so.  Every
other test asserts what was declared, either way: a bound of the wait where there is one, and that
the wait ends where there is none; that no interrupt leaves the lock taken, or that the interrupted thread can give it
back; TooManyLocksError for one lock more than a thread may hold, or that it may hold that one as well; that a waiter
sleeps, or that it looks again.

A store needs a database of its own, with no lock in it before: each test empties it.  ``COHELD_BACKEND=redis://…``,
``postgresql://…``.

A new backend is a module of ``coheld.backends``, which has what ``base.py`` says there, and its scheme in
``backends/__init__.py``; or what another distribution has as an entry point of the group ``coheld.backends``
(docs/howto/backends.md), with a plugin of pytest that empties its store: ``-p MODULE``, see plugin.Hooks.  The tests
ask it nothing that others are not asked, but for how a wait looks from outside: ``support.states.blocked`` knows waits
in the kernel, and those on record in the cells of files.  It is done when
``COHELD_BACKEND=<its URL> python -m coheld.testing`` passes.
"""
