"""Pictures that follow their controls: attention maps, the online softmax, the walk over tiles, the KV cache.

Each widget is also stored as a picture, for pages where nothing runs (GitHub, exported HTML, print). The call is shown
at once and returns nothing, like `figures.show`.
"""

from course.widgets.cache import cache_filling
from course.widgets.grid import program_grid, tiles_by_program
from course.widgets.maps import attention_maps
from course.widgets.softmax import online_softmax
from course.widgets.walk import tile_walk

__all__ = ["attention_maps", "cache_filling", "online_softmax", "program_grid", "tile_walk", "tiles_by_program"]
