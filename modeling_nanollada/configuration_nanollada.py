"""Bridge: the modeling files import the configuration as a sibling, as they must on the Hub.

`save_pretrained` writes the real configuration file in this one's place.
"""

from nanollada.configuration_nanollada.configuration_nanollada import NanoLLaDAConfig  # noqa: F401
