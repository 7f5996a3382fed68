"""A cluster's part played on one machine: pods started from the chart's own manifests, rolled, scaled and killed."""
