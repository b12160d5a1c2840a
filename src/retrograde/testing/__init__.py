"""What every method and every layer kind must keep to, as checks that third parties run on theirs; pytest not needed.

>>> check_method(lambda: MyMethod(warmup=1), neutral=lambda: MyMethod(strength=0))
>>> check_layer(lambda: MyLayer(6, 8), input_shape=(4, 6))
"""

from retrograde.testing.cases import LAYERS as LAYERS
from retrograde.testing.cases import METHODS as METHODS
from retrograde.testing.cases import Case as Case
from retrograde.testing.cases import Layer as Layer
from retrograde.testing.layer import check_layer as check_layer
from retrograde.testing.method import CHECKS as CHECKS
from retrograde.testing.method import check_method as check_method
from retrograde.testing.method import declined as declined
