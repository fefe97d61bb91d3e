"""Gone: the methods are in ``toprl_models.methods``."""

raise ImportError("toprl_models.baselines is toprl_models.methods now; the methods by name are toprl_models.METHODS")
