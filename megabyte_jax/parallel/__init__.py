"""Says what the devices are, how arrays lie on a mesh and how processes find each other; no model lives here."""
