{{- define "cliphar.name" -}}
{{- $name := ternary .Release.Name (print .Release.Name "-" .Chart.Name) (contains .Chart.Name .Release.Name) }}
{{- .Values.fullnameOverride | default $name | trunc 58 | trimSuffix "-" }}{{/* "-page" follows; a service has 63 */ -}}
{{- end }}

{{- define "cliphar.image" -}}
{{ .root.Values.image.repository }}:{{ .root.Values.image.tag | default (print "v" .root.Chart.AppVersion) }}-{{ .target }}
{{- end }}

{{- define "cliphar.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "cliphar.labels" -}}
{{ include "cliphar.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* A pod's metadata; "where" has the values of the API, or of the page. */}}
{{- define "cliphar.podMetadata" -}}
labels:
  {{- include "cliphar.labels" . | nindent 2 }}
  {{- with .where.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .where.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What the pods of both have alike, and where they run. */}}
{{- define "cliphar.pod" -}}
serviceAccountName: {{ include "cliphar.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false  # a service named cliphar would set CLIPHAR_PORT to an address
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
topologySpreadConstraints:
  {{- range tuple "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "cliphar.selector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - {{ kindIs "map" . | ternary . (dict "name" .) | toJson }}
{{- end }}
{{- end }}
{{- with .where.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .where.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .where.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "cliphar.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Variables: the chart's own, whose place one of the values may take, so that none is there twice. */}}
{{- define "cliphar.env" -}}
{{- $all := .own }}
{{- range $key, $value := .given }}{{ $_ := set $all $key $value }}{{ end }}
{{- range $key, $value := $all }}
{{- if kindIs "map" $value }}
- {name: {{ $key }}, valueFrom: {{ toJson $value }}}
{{- else }}
{{- /* JSON writes large numbers out */}}
- {name: {{ $key }}, value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}}
{{- end }}
{{- end }}
{{- end }}
