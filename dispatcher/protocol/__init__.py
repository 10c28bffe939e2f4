"""Values that cross a process, their codec, and every name they travel under.

Nothing here does I/O or knows a client library: the package needs the standard library and
msgspec only, so that an agent, a dispatcher, an SDK and the audit all agree by construction.
The wire formats are specified for other languages in `dispatcher/docs/protocol.md`.
"""
