"""From records to what people and CI read: tables, gate, report, recommendation, comparison."""
