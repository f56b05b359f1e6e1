"""The plan of a host: ``plan`` compares what exists with what a scope wants and returns the steps between them.

``have.py`` describes a host as it was observed, ``steps.py`` has the steps, ``segments.py`` finds the bridge of each
segment, ``plan.py`` decides. Nothing here reads or changes the host: ``agent.host.observe`` looks, ``agent.host.apply``
carries out.
"""
