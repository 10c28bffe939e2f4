"""What runs FlexLB in containers: image, health check, Prometheus and Grafana settings."""
