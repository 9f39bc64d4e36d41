"""What the tests need of the source tree, or of the machine, beside coheld.testing.support.

native        the plain C lock as a program of its own
environments  virtual environments, and wheels built here
optional      what the ordinary environment lacks: PYATS, VALGRIND
"""
