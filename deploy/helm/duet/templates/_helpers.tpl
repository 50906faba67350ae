{{- define "duet.name" -}}
{{- printf "%s-duet" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "duet.labels" -}}
app.kubernetes.io/name: duet
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: duet
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "duet.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "duet.name" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "duet.address" -}}
{{- printf "%s://%s-coordinator.%s.svc:%v" (ternary "https" "http" (ne .Values.tls.secretPrefix "")) (include "duet.name" .) .Release.Namespace .Values.network.port -}}
{{- end -}}

{{/* What every process is told beside the file: the same in all, since workers with another
     configuration than the run's are refused. */}}
{{- define "duet.env" -}}
- name: DUET__RUN__STORE
  value: {{ required "store.url: where everything durable lies, as s3://bucket/prefix" .Values.store.url | quote }}
- name: DUET__MODEL__PATH
  value: {{ .Values.model.path | quote }}
- name: DUET__DATA__PROMPTS
  value: {{ .Values.data.prompts | quote }}
- name: DUET__COORDINATOR__LISTEN
  value: "0.0.0.0:{{ .Values.network.port }}"
- name: DUET__TRAINER__WORLD_SIZE
  value: {{ .Values.trainer.replicas | quote }}
{{- with .Values.scorer.url }}
- name: DUET__REWARD__HTTP__URL
  value: {{ . | quote }}
{{- end }}
{{- if .Values.tls.secretPrefix }}
- name: DUET__SECURITY__CA
  value: /etc/duet/tls/ca.crt
- name: DUET__SECURITY__CERTIFICATE
  value: /etc/duet/tls/tls.crt
- name: DUET__SECURITY__KEY
  value: /etc/duet/tls/tls.key
{{- else if .Values.network.trusted }}
- name: DUET__SECURITY__ALLOW_PLAINTEXT
  value: "true"
{{- else }}
{{- fail "give tls.secretPrefix, or set network.trusted=true on a network that you trust" }}
{{- end }}
{{- range $key, $value := .Values.set }}
- name: DUET__{{ $key | upper | replace "." "__" }}
  value: {{ $value | toString | quote }}
{{- end }}
- name: DUET_LOG
  value: {{ .Values.log.level | quote }}
- name: DUET_LOG_FORMAT
  value: {{ .Values.log.format | quote }}
{{- end -}}
