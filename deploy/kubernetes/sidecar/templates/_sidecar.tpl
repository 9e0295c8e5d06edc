{{/* The pod of sidecar.yaml. As a dependency: include "..." (index .Subcharts "lakebase-auth-proxy") */}}
{{- define "lakebase-auth-proxy.pod" -}}
{{- $pod := (.Files.Get "sidecar.yaml" | fromYaml).spec.template.spec -}}
{{- with .Values.image }}{{ $_ := set (index $pod.initContainers 0) "image" . }}{{ end -}}
{{- $sources := (index $pod.volumes 0).projected.sources -}}
{{- $_ := set (index $sources 0).configMap "name" .Values.name -}}
{{- $_ := set (index $sources 1).secret "name" .Values.name -}}
{{- toYaml $pod -}}
{{- end -}}

{{/* The items for a pod's initContainers. */}}
{{- define "lakebase-auth-proxy.initContainers" -}}
{{- (include "lakebase-auth-proxy.pod" . | fromYaml).initContainers | toYaml -}}
{{- end -}}

{{/* The items for a pod's volumes. */}}
{{- define "lakebase-auth-proxy.volumes" -}}
{{- (include "lakebase-auth-proxy.pod" . | fromYaml).volumes | toYaml -}}
{{- end -}}

{{/* The labels for a pod, by which pod-monitor.yaml finds it. */}}
{{- define "lakebase-auth-proxy.labels" -}}
{{- (.Files.Get "sidecar.yaml" | fromYaml).spec.template.metadata.labels | toYaml -}}
{{- end -}}
