"""Keep/drop logits of the actor network (the network whose cost is Eq. 11)."""
