{{/* One role. */}}
{{- define "duet.job" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $values := .values -}}
{{- $first := eq $role "coordinator" -}}
{{- $replicas := $first | ternary 1 $values.replicas -}}
- name: {{ $role }}
  replicas: 1
  {{- if not $first }}
  dependsOn:
    - {name: coordinator, status: Ready}
  {{- end }}
  template:
    metadata:
      labels:
        {{- include "duet.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $role }}
    spec:
      completionMode: Indexed
      parallelism: {{ $replicas }}
      completions: {{ $replicas }}
      backoffLimit: {{ $values.retries }}
      podReplacementPolicy: Failed
      # Exit codes: 64 and 78 cannot be helped by starting again; 143 was sent away in order.
      podFailurePolicy:
        rules:
          - action: FailJob
            onExitCodes: {containerName: {{ $role }}, operator: In, values: [64, 78]}
          - action: Ignore
            onExitCodes: {containerName: {{ $role }}, operator: In, values: [143]}
          - action: Ignore
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
      template:
        metadata:
          labels:
            {{- include "duet.labels" $root | nindent 12 }}
            app.kubernetes.io/component: {{ $role }}
          annotations:
            duet/config: {{ sha256sum $root.Values.config | quote }}
            {{- if ne $role "rollout" }}
            cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
            {{- end }}
            {{- if and (eq $role "trainer") $root.Values.kueue.topology }}
            kueue.x-k8s.io/podset-preferred-topology: {{ $root.Values.kueue.topology | quote }}
            {{- end }}
        spec:
          {{- include "duet.pod" . | nindent 10 }}
{{- end -}}

{{- define "duet.pod" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $values := .values -}}
{{- $first := eq $role "coordinator" -}}
restartPolicy: Never
serviceAccountName: {{ include "duet.serviceAccount" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $values.graceSeconds }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: {{ $role }}
    image: {{ required "images.coordinator and images.gpu: give both, by digest" ($first | ternary $root.Values.images.coordinator $root.Values.images.gpu) | quote }}
    imagePullPolicy: {{ $root.Values.images.pullPolicy }}
    command: [sh, /usr/local/bin/duet-node, run]
    {{- if $first }}
    args: [duet-coordinator, --config, /etc/duet/run.toml, --resume]
    ports:
      - {name: grpc, containerPort: {{ $root.Values.network.port }}}
    {{- else }}
    args:
      - duet-{{ $role | replace "rollout" "rollout-worker" | replace "reward" "reward-worker" }}
      - run
      - --config=/etc/duet/run.toml
      - --coordinator={{ include "duet.address" $root }}
    {{- end }}
    env:
      {{- include "duet.env" $root | nindent 6 }}
    {{- with $root.Values.store.secretName }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    resources:
      {{- toYaml $values.resources | nindent 6 }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL]}
    {{- include "duet.probes" . | nindent 4 }}
    volumeMounts:
      - {name: config, mountPath: /etc/duet/run.toml, subPath: run.toml, readOnly: true}
      - {name: tmp, mountPath: /tmp}
      {{- if not $first }}
      - {name: shm, mountPath: /dev/shm}
      {{- end }}
      {{- if $root.Values.tls.secretPrefix }}
      - {name: tls, mountPath: /etc/duet/tls, readOnly: true}
      {{- end }}
      {{- with $root.Values.mounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap: {name: {{ include "duet.name" $root }}}
  - name: tmp
    emptyDir: {}
  {{- if not $first }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $values.sharedMemory }}}
  {{- end }}
  {{- with $root.Values.tls.secretPrefix }}
  - name: tls
    secret: {secretName: {{ . }}-{{ $role }}, defaultMode: 288}
  {{- end }}
  {{- with $root.Values.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The coordinator answers for its own event loop; a worker is asked after at the coordinator, and is
     never blamed for one that does not answer. Nothing asks whether training makes progress. */}}
{{- define "duet.probes" -}}
{{- $root := .root -}}
{{- if eq .role "coordinator" -}}
{{- $probe := dict "grpc" (dict "port" $root.Values.network.port) -}}
{{- if $root.Values.tls.secretPrefix -}}
{{- /* The kubelet has no client certificate. */ -}}
{{- $probe = dict "tcpSocket" (dict "port" "grpc") -}}
{{- end -}}
startupProbe:
  {{- toYaml $probe | nindent 2 }}
  periodSeconds: 5
  failureThreshold: 120
livenessProbe:
  {{- toYaml $probe | nindent 2 }}
  periodSeconds: 20
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  {{- toYaml $probe | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
{{- else -}}
{{- $node := list "sh" "/usr/local/bin/duet-node" -}}
{{- $whom := list (include "duet.address" $root) .role -}}
startupProbe:
  exec:
    command: {{ concat $node (list "ready") $whom | toJson }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: {{ div .values.startSeconds 10 }}
readinessProbe:
  exec:
    command: {{ concat $node (list "ready") $whom | toJson }}
  periodSeconds: 30
  timeoutSeconds: 10
livenessProbe:
  exec:
    command: {{ concat $node (list "alive") $whom | toJson }}
  periodSeconds: 60
  timeoutSeconds: 10
  failureThreshold: 5
lifecycle:
  preStop:
    exec:
      command: {{ concat $node (list "drain") $whom | toJson }}
{{- end -}}
{{- end -}}
