// kube-lite: a real Kubernetes control plane in one binary, for tests.
//
//	kube-lite up [flags]              etcd + kube-apiserver + kube-controller-manager + fake kubelet, one process
//	kube-lite kube-apiserver ...      the upstream command, unchanged
//	kube-lite kube-controller-manager ...
//	kube-lite kubectl ...
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"crypto/tls"

	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/component-base/cli"
	logsapi "k8s.io/component-base/logs/api/v1"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

const controllers = "serviceaccount-controller,serviceaccount-token-controller,root-ca-certificate-publisher-controller," +
	"namespace-controller,endpoints-controller,endpointslice-controller,endpointslice-mirroring-controller," +
	"deployment-controller,replicaset-controller,statefulset-controller,daemonset-controller,job-controller," +
	"garbage-collector-controller,certificatesigningrequest-signing-controller,certificatesigningrequest-approving-controller," +
	"clusterrole-aggregation-controller,disruption-controller,horizontal-pod-autoscaler-controller"

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: kube-lite up|kube-apiserver|kube-controller-manager|kubectl")
		os.Exit(2)
	}
	sub := os.Args[1]
	args := os.Args[2:]
	switch sub {
	case "kube-apiserver":
		c := apiserver.NewAPIServerCommand()
		c.SetArgs(args)
		os.Exit(cli.Run(c))
	case "kube-controller-manager":
		c := kcm.NewControllerManagerCommand()
		c.SetArgs(args)
		os.Exit(cli.Run(c))
	case "kubectl":
		os.Args = append([]string{"kubectl"}, args...)
		c := kubectl.NewDefaultKubectlCommand()
		if err := cli.RunNoErrOutput(c); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "up":
		up(args)
	default:
		fmt.Fprintln(os.Stderr, "unknown subcommand", sub)
		os.Exit(2)
	}
}

func freePort() int {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		die(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func die(err error) {
	fmt.Fprintln(os.Stderr, "kube-lite:", err)
	os.Exit(1)
}

func up(args []string) {
	t0 := time.Now()
	fs := flag.NewFlagSet("up", flag.ExitOnError)
	dir := fs.String("data-dir", "", "state directory (kubeconfig, certs, etcd)")
	port := fs.Int("port", 0, "apiserver port, 0 picks one")
	withKCM := fs.Bool("controllers", true, "run kube-controller-manager controllers")
	kcmProc := fs.Bool("controllers-subprocess", false, "run them in a child process")
	withKubelet := fs.Bool("fake-kubelet", true, "bind pods and mark them Running")
	owned := fs.Bool("until-stdin-closes", false, "stop when standard input ends, and remove the data directory")
	keep := fs.Bool("keep", false, "close etcd cleanly, for a data directory that is used again")
	podNet := fs.String("pod-cidr", "10.244.0.0/16", "addresses given to pods")
	_ = fs.Parse(args)
	if *dir == "" {
		die(fmt.Errorf("--data-dir is needed"))
	}
	if *port == 0 {
		*port = freePort()
	}
	d, err := filepath.Abs(*dir)
	if err != nil {
		die(err)
	}
	p := func(s string) string { return filepath.Join(d, s) }
	if err := os.MkdirAll(p("pki"), 0o700); err != nil {
		die(err)
	}
	ca := writePKI(p("pki"))
	base := fmt.Sprintf("https://127.0.0.1:%d", *port)
	writeKubeconfig(p("kubeconfig"), base, p("pki"))

	// etcd
	ec := embed.NewConfig()
	ec.Dir = p("etcd")
	ec.LogLevel = "error"
	ec.UnsafeNoFsync = true
	cu, _ := url.Parse(fmt.Sprintf("http://127.0.0.1:%d", freePort()))
	pu, _ := url.Parse(fmt.Sprintf("http://127.0.0.1:%d", freePort()))
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{*cu}, []url.URL{*cu}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{*pu}, []url.URL{*pu}
	ec.InitialCluster = ec.Name + "=" + pu.String()
	e, err := embed.StartEtcd(ec)
	if err != nil {
		die(err)
	}
	<-e.Server.ReadyNotify()
	fmt.Printf("etcd ready %v\n", time.Since(t0).Round(time.Millisecond))

	// The two upstream commands share one process, as in k3s.
	logsapi.ReapplyHandling = logsapi.ReapplyHandlingIgnoreUnchanged

	ac := apiserver.NewAPIServerCommand()
	ac.SetArgs([]string{
		"--etcd-servers=" + cu.String(),
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", *port),
		"--tls-cert-file=" + p("pki/apiserver.crt"), "--tls-private-key-file=" + p("pki/apiserver.key"),
		"--client-ca-file=" + p("pki/ca.crt"),
		"--requestheader-client-ca-file=" + p("pki/ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-signing-key-file=" + p("pki/sa.key"), "--service-account-key-file=" + p("pki/sa.pub"),
		"--authorization-mode=Node,RBAC", "--anonymous-auth=true",
		"--service-cluster-ip-range=10.96.0.0/16",
		"--endpoint-reconciler-type=none", "--advertise-address=127.0.0.1",
		"--allow-privileged=true", "--profiling=false", "--v=0",
	})
	go func() { die(fmt.Errorf("kube-apiserver ended: %v", ac.Execute())) }()

	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.pool, Certificates: []tls.Certificate{ca.admin}}}, Timeout: 2 * time.Second}
	wait(hc, base+"/livez", t0)
	wait(hc, base+"/readyz", t0)

	if *withKCM {
		a := []string{
			"--kubeconfig=" + p("kubeconfig"), "--leader-elect=false", "--secure-port=0",
			"--controllers=" + controllers,
			"--service-account-private-key-file=" + p("pki/sa.key"), "--root-ca-file=" + p("pki/ca.crt"),
			"--cluster-signing-cert-file=" + p("pki/ca.crt"), "--cluster-signing-key-file=" + p("pki/ca.key"),
			"--feature-gates=ControllerManagerReleaseLeaderElectionLockOnExit=false", "--v=0",
		}
		if *kcmProc {
			cmd := exec.Command("/proc/self/exe", append([]string{"kube-controller-manager"}, a...)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				die(err)
			}
		} else {
			kc := kcm.NewControllerManagerCommand()
			kc.SetArgs(a)
			go func() { die(fmt.Errorf("kube-controller-manager ended: %v", kc.Execute())) }()
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if *owned {
		// The pipe's other end closes with whoever started us, however it ends.
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			_ = os.RemoveAll(d)
			os.Exit(0)
		}()
	}
	if *withKubelet {
		if err := fakeKubelet(ctx, p("kubeconfig"), *podNet); err != nil {
			die(err)
		}
	}
	fmt.Printf("up %v KUBECONFIG=%s\n", time.Since(t0).Round(time.Millisecond), p("kubeconfig"))
	<-ctx.Done()
	if *keep {
		e.Close()
	}
	os.Exit(0) // a throw-away cluster: the upstream graceful stop takes 8 s
}

func wait(hc *http.Client, u string, t0 time.Time) {
	last := ""
	for {
		r, err := hc.Get(u)
		if err == nil {
			r.Body.Close()
			if r.StatusCode == 200 {
				fmt.Printf("%s %v\n", u[strings.LastIndex(u, "/"):], time.Since(t0).Round(time.Millisecond))
				return
			}
			last = r.Status
		} else {
			last = err.Error()
		}
		if time.Since(t0) > 2*time.Minute {
			die(fmt.Errorf("%s: %s", u, last))
		}
		time.Sleep(50 * time.Millisecond)
	}
}
