"""A supervisord plugin that manages the life of local llama.cpp servers.

Deliberately empty: `synapse-run` and the plugin inside supervisord import this
package, and must not pay for anything they do not use.
"""
